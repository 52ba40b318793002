"""The tensors of a plain model by name, in its state and outside it, and how to replace them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.modules import buffers_of
from l0hooks._torch.tensors import is_meta, same_tensor
from l0hooks.errors import InvalidValueError, explain
from l0hooks.export.extra_state import is_extra

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # attributes that are no place for a model's own tensors


def ties(model: nn.Module) -> dict[str, str]:
    """For every tensor of the state its first name: its own, unless it is tied to an earlier one."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not is_extra(name):
            found[name] = first.setdefault(same_tensor(tensor) if tensor.numel() else (name,), name)
    return found


def first_names(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state, tied ones once."""
    state = model.state_dict()
    return {name: state[name] for name, first in ties(model).items() if name == first}


def hidden_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Buffers and attributes that are tensors and not in the state; one that has several names once.

    Evaluation may depend on them: pruning may have cut them, or a forward may have filled them.

    Examples
    --------
    >>> model = nn.Linear(2, 2)
    >>> model.register_buffer("scale", torch.ones(2), persistent=False)
    >>> list(hidden_tensors(model))
    ['scale']
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for name, _, _, tensor in _places(model):
        if tensor is not None:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def put_hidden(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Put tensors where the model has buffers and attributes outside its state; returns the names without a place."""
    replaced: dict[int, Tensor] = {}
    left = set(tensors)
    like = next((p for p in model.parameters() if not is_meta(p)), None)
    for name, table, attribute, old in list(_places(model)):
        new = tensors.get(name)
        if new is not None:
            left.discard(name)
            beside = like if old is None or is_meta(old) else old
            new = new if beside is None or is_meta(new) else new.to(beside.device)
            if old is not None:
                replaced[id(old)] = new
        elif old is not None:
            new = replaced.get(id(old))  # another name of one that was replaced
        if new is not None:
            table[attribute] = new
    return sorted(left)


def _places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor | None]]:
    """Buffers and attributes outside the state that hold a tensor or nothing: (name, table, key, tensor)."""
    state = model.state_dict()
    inside = {same_tensor(t) for t in state.values() if isinstance(t, Tensor) and t.layout == torch.strided}
    for path, module in model.named_modules():
        buffers = buffers_of(module)
        attributes = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
        for table, own in ((buffers, dict(buffers)), (vars(module), attributes)):
            for key, value in own.items():
                name = f"{path}.{key}".lstrip(".")
                kept = value is None or (isinstance(value, Tensor) if table is buffers else type(value) is Tensor)
                known = isinstance(value, Tensor) and value.layout == torch.strided and same_tensor(value) in inside
                if kept and name not in state and not known:
                    yield name, table, key, value


def load_tensors(
    model: nn.Module, tensors: dict[str, Tensor], names: dict[str, str], extra: dict[str, Any], where: str
) -> None:
    """Copy the tensors into the model, with its extra states; those on the meta device are replaced by them."""
    if not any(is_meta(tensor) for tensor in (*model.parameters(), *model.buffers())):
        _load(model, {name: tensors[first] for name, first in names.items()} | extra, where)
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    placed: dict[str, Tensor] = {}
    for name, old in first_names(model).items():
        new = tensors[name] if is_meta(old) else tensors[name].to(old.device)
        placed[name] = nn.Parameter(new, requires_grad=parameters[name].requires_grad) if name in parameters else new
    _load(model, {name: placed[first] for name, first in names.items()} | extra, where, assign=True)
    left = [name for name, buffer in model.named_buffers() if is_meta(buffer)]
    left += [f"{n}.{k}".lstrip(".") for n, m in model.named_modules() for k, v in vars(m).items() if _lacks_data(v)]
    if left:
        raise InvalidValueError(
            explain(
                where,
                "the file must hold all that the factory makes on the meta device.",
                got=f"nothing for {', '.join(left[:4])}",
                hint="a factory that builds the model with data; or save_pruned again, with this version",
            )
        )


def _load(model: nn.Module, state: dict[str, Any], where: str, *, assign: bool = False) -> None:
    try:
        model.load_state_dict(state, strict=True, assign=assign)
    except Exception as error:  # the model's own set_extra_state can raise anything
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InvalidValueError(explain(where, "the model must take the state of the file.", got=got)) from error


def _lacks_data(value: object) -> bool:
    return isinstance(value, Tensor) and is_meta(value)
