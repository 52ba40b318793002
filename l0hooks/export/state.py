"""The tensors of a plain model by name, and how others take their places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.modules import buffers_of
from l0hooks._torch.tensors import is_meta, same_tensor
from l0hooks.errors import InvalidValueError, explain


def ties(model: nn.Module) -> dict[str, str]:
    """For every tensor of the state its first name: its own, unless it is tied to an earlier one."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            found[name] = first.setdefault(same_tensor(tensor) if tensor.numel() else (name,), name)
    return found


def first_names(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state, tied ones once."""
    state = model.state_dict()
    return {name: state[name] for name, first in ties(model).items() if name == first}


def hidden_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that the state leaves out: pruning may have cut them, and on the meta device they have no data."""
    if isinstance(model, torch.fx.GraphModule):
        return {}
    state = model.state_dict()
    return {name: b for name, b in model.named_buffers() if name not in state}


def load_hidden(model: nn.Module, hidden: dict[str, Tensor]) -> None:
    """Replace those buffers that are smaller than the factory's, or that it made without data.

    Others it may well make in another size.
    """
    for name, old in hidden_buffers(model).items():
        new = hidden.get(name)
        if new is None:
            continue
        smaller = new.dim() == old.dim() and new.shape != old.shape and old.is_floating_point()
        path, _, attribute = name.rpartition(".")
        if is_meta(old):
            buffers_of(model.get_submodule(path))[attribute] = new
        elif smaller and all(a <= b for a, b in zip(new.shape, old.shape, strict=True)):
            buffers_of(model.get_submodule(path))[attribute] = new.to(old)


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], names: dict[str, str], path: str | Path) -> None:
    """Copy the tensors into the model; what is on the meta device takes them as they are."""
    if not any(is_meta(tensor) for tensor in (*model.parameters(), *model.buffers())):
        model.load_state_dict({name: tensors[first] for name, first in names.items()}, strict=True)
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    placed: dict[str, Tensor] = {}
    for name, old in first_names(model).items():
        new = tensors[name] if is_meta(old) else tensors[name].to(old.device)
        placed[name] = nn.Parameter(new, requires_grad=parameters[name].requires_grad) if name in parameters else new
    model.load_state_dict({name: placed[first] for name, first in names.items()}, strict=True, assign=True)
    left = [name for name, buffer in model.named_buffers() if is_meta(buffer)]
    left += [f"{n}.{k}".lstrip(".") for n, m in model.named_modules() for k, v in vars(m).items() if _lacks_data(v)]
    if left:
        raise InvalidValueError(
            explain(
                f"load_pruned {path}",
                "the file must hold all that the factory makes on the meta device.",
                got=f"nothing for {', '.join(left[:4])}",
                hint="a factory that builds the model with data; or save_pruned again, with this version",
            )
        )


def _lacks_data(value: object) -> bool:
    return isinstance(value, Tensor) and is_meta(value)
