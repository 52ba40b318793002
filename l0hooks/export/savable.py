"""Which models ``save_pruned`` can write so that they come back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l0hooks._torch.tensors import has_meta, is_meta, is_sharded
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import StateError, explain
from l0hooks.export.extra_state import is_extra
from l0hooks.export.recipe import recipe_of, recipes_inside
from l0hooks.export.state import hidden_tensors


def check_savable(model: nn.Module) -> None:
    """Refuse a model that a factory and a file of plain tensors cannot give back.

    Raises
    ------
    StateError

    Examples
    --------
    >>> check_savable(nn.Linear(2, 2))
    """
    got = _obstacle(model)
    if got is not None:
        raise StateError(explain("save_pruned", "the model must be plain and dense.", got=got))


def _obstacle(model: nn.Module) -> str | None:
    """Why ``model`` cannot be saved; None if it can."""
    if not isinstance(model, nn.Module):
        return f"a {type(model).__name__}"
    if next(iter_gated(model), None) is not None:
        return "a model with gates: prune it first"
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        return f"TorchScript{f' at {scripted[0]!r}' if scripted[0] else ''}: torch.jit.save it"
    lazy = [name for name, module in model.named_modules() if isinstance(module, nn.modules.lazy.LazyModuleMixin)]
    if lazy:
        return f"a lazy layer at {lazy[0]!r}: run the model once"
    if has_meta(model) or any(map(is_meta, model.buffers())):
        return "parameters on the meta device, which have no data"
    if isinstance(model, torch.fx.GraphModule) and recipe_of(model) is None:
        return "a graph that prune did not make: torch.export.save it"
    foreign = [name for name, recipe in recipes_inside(model).items() if recipe is None]
    if foreign:
        return f"a graph at {foreign[0]!r} that prune did not make: torch.save it"
    return _obstacle_in_state(model)


def _obstacle_in_state(model: nn.Module) -> str | None:
    parameters, buffers = (named(remove_duplicate=False) for named in (model.named_parameters, model.named_buffers))
    own = {*dict(parameters), *dict(buffers)}
    state = {name: value for name, value in model.state_dict().items() if not is_extra(name)}
    for name, value in state.items():
        got = _obstacle_at(name, value)
        if got is None and name not in own:
            got = f"{name!r} in the state, which is no parameter or buffer of that name"
        if got is not None:
            return got
    missing = [name for name, _ in model.named_parameters() if name not in state]
    if missing:
        return f"the parameter {missing[0]!r}, which is not in the state"
    return next((got for name, value in hidden_tensors(model).items() if (got := _obstacle_at(name, value))), None)


def _obstacle_at(name: str, value: object) -> str | None:
    if not isinstance(value, Tensor):
        return f"{name!r} in the state, which is no tensor but a {type(value).__name__}"
    if value.layout != torch.strided:
        return "sparse tensors: prune without sparse_format"
    if is_sharded(value):
        return f"a weight at {name!r} that fully_shard has spread over several processes"
    if value.is_quantized or type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"a {type(value).__name__} of {value.dtype} at {name!r}: torch.save it"
    return None
