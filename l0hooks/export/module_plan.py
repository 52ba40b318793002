"""What pruning changed in the modules of a model, as plain data, and how to change another model alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from l0hooks.errors import InvalidValueError, explain
from l0hooks.export.extra_state import extra_states, is_extra
from l0hooks.export.state import first_names, hidden_tensors, put_hidden, ties
from l0hooks.structure.cut_modules import Cut, apply_cuts
from l0hooks.structure.layers import CONVOLUTIONS, TRANSPOSED
from l0hooks.structure.remove_blocks import entries_of, is_list, kept_blocks, remove_blocks
from l0hooks.structure.settings import Path as Place
from l0hooks.structure.settings import change, integers

_FACTORY = "the factory that built the model before it was pruned"
_NOT_COMPARED = {"p", "dropout", "momentum", "inplace", "normalized_shape"}  # no part of evaluation, or a size


@dataclass(frozen=True)
class ModulePlan:
    """The sizes and settings of a model's modules, as plain data.

    Attributes
    ----------
    shapes : dict from name to shape
        Of the tensors in the state, tied ones once.
    hidden : dict from name to shape
        Of buffers and tensors outside the state.
    biases : tuple of str
        All biases in the state: pruning may have added some.
    sizes : tuple of (module, path, value)
        All integers in attributes, tuples and configurations of one module: pruning may have changed any of them. What
        several modules hold together is left as the factory makes it, because pruning changes copies.
    settings : dict from module to str
        What pruning never changes in torch's layers, such as kernel sizes and strides: the factory's must be equal.
    extra : dict from name to plain data
        What modules returned from ``get_extra_state``.
    lists : dict from module to (int, tuple of int)
        Of each list that blocks were taken out of: how many entries it had, and which are left.
    """

    shapes: dict[str, tuple[int, ...]]
    hidden: dict[str, tuple[int, ...]]
    biases: tuple[str, ...]
    sizes: tuple[tuple[str, Place, int], ...]
    settings: dict[str, str]
    extra: dict[str, Any]
    lists: dict[str, tuple[int, tuple[int, ...]]]


def module_plan(model: nn.Module) -> ModulePlan:
    """The plan of a model that consists of its own modules.

    Examples
    --------
    >>> plan = module_plan(nn.Linear(3, 2))
    >>> plan.shapes, plan.biases, plan.sizes
    ({'weight': (2, 3), 'bias': (2,)}, ('bias',), (('', ('in_features',), 3), ('', ('out_features',), 2)))
    """
    return ModulePlan(
        {name: tuple(tensor.shape) for name, tensor in first_names(model).items()},
        {name: tuple(tensor.shape) for name, tensor in hidden_tensors(model).items()},
        tuple(sorted(name for name in model.state_dict() if name.rpartition(".")[2] == "bias")),
        tuple(_sizes(model)),
        _settings(model),
        extra_states(model),
        kept_blocks(model),
    )


def _sizes(model: nn.Module) -> Iterator[tuple[str, Place, int]]:
    holders = Counter(id(value) for module in model.modules() for value in vars(module).values())
    for name, module in model.named_modules():
        of_torch = type(module).__module__.startswith("torch.nn.")
        for place, value in integers(module):
            alone = holders[id(vars(module)[str(place[0])])] == 1
            if len(place) == 1 or (alone and not of_torch):
                yield name, place, value


def shape_like(model: nn.Module, plan: ModulePlan, where: str) -> None:
    """Give ``model`` the biases, shapes and sizes of ``plan``, **in place**; everything is checked before.

    Raises
    ------
    InvalidValueError
        If the plan is not one of such a model.

    Examples
    --------
    >>> model = nn.Linear(3, 2)
    >>> shape_like(model, module_plan(nn.Linear(3, 1)), "an example")
    >>> model
    Linear(in_features=3, out_features=1, bias=True)
    """
    remove_lost(model, plan, where)
    modules = dict(model.named_modules())
    missing = _missing_biases(modules, plan)
    old = {name: tuple(tensor.shape) for name, tensor in first_names(model).items()}
    old |= {name: (layer.get_parameter("weight").shape[0],) for name, layer in missing.items()}
    check_names(set(plan.shapes), set(old), where)
    check_names(set(plan.extra), {name for name in model.state_dict() if is_extra(name)}, where)
    for name, shape in plan.shapes.items():
        _check_shape(modules, name, old[name], shape, where)
    _check_modules(modules, plan, where)
    for layer in missing.values():
        weight = layer.get_parameter("weight")
        layer.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)
    names = ties(model)
    apply_cuts(model, [_cut(name, tensor, plan.shapes[name], names) for name, tensor in first_names(model).items()])
    present = hidden_tensors(model)
    put_hidden(model, {name: _of_shape(present[name], n) for name, n in plan.hidden.items() if name in present})
    known = {name: dict(integers(module)) for name, module in modules.items()}
    for module_name, place, value in plan.sizes:
        if known[module_name].get(place, value) != value:
            change(modules[module_name], place, value)


def remove_lost(model: nn.Module, plan: ModulePlan, where: str) -> None:
    """Take out of lists, **in place**, the entries that the plan's lost; a config may have left them out already.

    Raises
    ------
    InvalidValueError
        If the plan is not one of such lists.
    """
    modules, gone = dict(model.named_modules()), []
    for name, (count, kept) in plan.lists.items():
        module = modules.get(name)
        if module is None or not is_list(module):
            raise misfit(where, name or "the model", "a list of blocks", type(module).__name__)
        entries = entries_of(module)
        if any(b <= a for a, b in pairwise((-1, *kept, count))):
            raise misfit(where, name, f"entries below {count}, in order", kept)
        if len(entries) not in (count, len(kept)):
            raise misfit(where, name, f"{count} entries", len(entries))
        if len(entries) == count:
            gone += [f"{name}.{key}".lstrip(".") for n, (key, _) in enumerate(entries) if n not in kept]
    remove_blocks(model, gone)


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """The file must hold what the factory's model holds.

    Raises
    ------
    InvalidValueError
    """
    if found != expected:
        raise InvalidValueError(
            explain(
                where,
                "the file must hold the tensors of the factory's model.",
                expected=f"also {sorted(expected - found)[:4]}",
                got=f"besides {sorted(found - expected)[:4]}",
                hint=_FACTORY,
            )
        )


def misfit(where: str, name: str, expected: object, got: object) -> InvalidValueError:
    """The error for a tensor or setting that does not fit the factory's model."""
    must = f"{name!r} must fit the factory's model."
    return InvalidValueError(explain(where, must, expected=expected, got=got, hint=_FACTORY))


def _missing_biases(modules: dict[str, nn.Module], plan: ModulePlan) -> dict[str, nn.Module]:
    """The layers that get a bias, by its name."""
    found: dict[str, nn.Module] = {}
    for name in plan.biases:
        layer = modules.get(name.rpartition(".")[0])
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)) and layer.bias is None and name in plan.shapes:
            found[name] = layer
    return found


def _check_shape(
    modules: dict[str, nn.Module], name: str, old: tuple[int, ...], new: tuple[int, ...], where: str
) -> None:
    path, _, attribute = name.rpartition(".")
    kernel = isinstance(modules.get(path), (*CONVOLUTIONS, *TRANSPOSED)) and attribute == "weight"
    fits = len(old) == len(new) and all(0 <= b <= a for a, b in zip(old, new, strict=True))
    if not fits or (kernel and old[2:] != new[2:]):
        raise misfit(where, name, f"at most {old}" + (f", with a kernel of {old[2:]}" if kernel else ""), new)


def _check_modules(modules: dict[str, nn.Module], plan: ModulePlan, where: str) -> None:
    absent = sorted({name for name, _, _ in plan.sizes if name not in modules})
    if absent:
        raise misfit(where, absent[0], "a module of that name", "none")
    own = {name: text for name, module in modules.items() if (text := _settings_of(module))}
    for name in sorted(own.keys() | plan.settings.keys()):
        if own.get(name) != plan.settings.get(name):
            raise misfit(where, name, own.get(name, "no such layer"), plan.settings.get(name, "no such layer"))


def _settings(model: nn.Module) -> dict[str, str]:
    return {name: text for name, module in model.named_modules() if (text := _settings_of(module))}


def _settings_of(module: nn.Module) -> str:
    """What torch's layers declare to be constant, as text; integers are left out, because they may be sizes."""
    declared = {name for cls in type(module).__mro__ for name in vars(cls).get("__constants__", ())}
    own: Mapping[str, Any] = vars(module)
    values = {name: own[name] for name in sorted(declared - _NOT_COMPARED) if name in own and _is_plain(own[name])}
    return repr(values) if values else ""


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(type(one) is int for one in value)
    return type(value) in (bool, float, str)


def _cut(name: str, old: Tensor, shape: tuple[int, ...], names: dict[str, str]) -> Cut:
    """A cut that gives ``old`` another shape; any indices will do, because the values are loaded later."""
    kept = tuple((d, tuple(range(n))) for d, n in enumerate(shape) if n != old.shape[d])
    return Cut(tuple(n for n, first in names.items() if first == name), tuple(old.shape), kept)


def _of_shape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``tensor`` cut to ``shape``, or as it is if that is no part of it; the values are loaded later."""
    part = tensor.dim() == len(shape) and all(0 <= b <= a for a, b in zip(tensor.shape, shape, strict=True))
    return tensor[tuple(slice(n) for n in shape)] if part and tensor.dim() else tensor
