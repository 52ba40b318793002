"""Where tensors lie: which of them are one, and models on the meta device, whose data come later."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree


def is_meta(tensor: Tensor) -> bool:
    """Whether ``tensor`` has no data."""
    return tensor.device.type == "meta"


def has_meta(model: nn.Module) -> bool:
    """Whether a parameter of ``model`` has no data.

    Examples
    --------
    >>> has_meta(nn.Linear(2, 2)), has_meta(nn.Linear(2, 2, device="meta"))
    (False, True)
    """
    return any(is_meta(parameter) for parameter in model.parameters())


def beside(model: nn.Module, example_inputs: Sequence[Any]) -> tuple[Any, ...]:
    """``example_inputs`` where ``model`` can take them: on the meta device if that is where its parameters are.

    Examples
    --------
    >>> beside(nn.Linear(2, 2, device="meta"), (torch.ones(1, 2), 3))
    (tensor(..., device='meta', size=(1, 2)), 3)
    """
    inputs = tuple(example_inputs)
    if not has_meta(model):
        return inputs
    moved: tuple[Any, ...] = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), inputs)
    return moved


def same_tensor(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is equal for tensors that are one: the same memory (on the meta device: storage), seen alike."""
    if tensor.numel() == 0 or not (tensor.is_meta or tensor.data_ptr()):  # nothing to share, or spread over processes
        return (id(tensor),)
    if tensor.is_meta:
        return tensor.device, *storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def storage_of(tensor: Tensor) -> tuple[bool, int]:
    """What is equal for tensors in one memory: its address, or on the meta device the storage's own."""
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    return (True, address) if address else (False, storage._cdata)


class Traversal:
    """Which function ``Module._apply`` carries through a model: a module that hangs at two places meets it twice."""

    def __init__(self) -> None:
        self._function: weakref.ref[Callable[[Tensor], Tensor]] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return Traversal, ()

    def again(self, function: Callable[[Tensor], Tensor]) -> bool:
        """Whether ``function`` was noted before."""
        return self._function is not None and self._function() is function

    def note(self, function: Callable[[Tensor], Tensor]) -> None:
        """Remember ``function`` for as long as it lives."""
        self._function = weakref.ref(function)

    def fills(self, function: Callable[[Tensor], Tensor], tensor: Tensor, start: float | None = None) -> bool:
        """Whether ``function`` finds ``tensor`` without data, or did so at another place that is the same module.

        With ``start``, what ``tensor`` was filled with then: once its values have moved, this is a later traversal.
        """
        if is_meta(tensor):
            self.note(function)
            return True
        return self.again(function) and (start is None or bool((tensor.detach() == start).all()))


class Tie:
    """One weight beneath the parametrizations of several layers; torch forgets that when it comes from the meta device.

    Parameters
    ----------
    chains : sequence of ParametrizationList
    """

    def __init__(self, chains: Sequence[parametrize.ParametrizationList]) -> None:
        self._chains = tuple(chains)
        self._first = self._chains[0]
        self._traversal = Traversal()
        self._is_one = len({id(chain.original) for chain in chains}) == 1  # else several parameters over one memory

    def meet(self, gating: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        """Before ``function`` moves the weight beneath ``gating``: if it has moved that of another layer, take that."""
        if self._traversal.again(function):
            self.rejoin(self._first)
        else:
            self._first = next(chain for chain in self._chains if chain[0] is gating)
            self._traversal.note(function)

    def rejoin(self, chain: parametrize.ParametrizationList) -> None:
        """Give all layers the parameter of ``chain``, or, if that has no data, of the first that has some."""
        own = [one.original for one in self._chains if isinstance(one.original, nn.Parameter)]
        found = next((p for p in (chain.original, *own) if isinstance(p, nn.Parameter) and not is_meta(p)), own[0])
        for one in self._chains:
            if one.original is not found and (self._is_one or same_tensor(one.original) != same_tensor(found)):
                one._parameters["original"] = found


def start_values(like: Tensor, start: float, device: torch.device) -> nn.Parameter:
    """A parameter of the shape of ``like`` that holds ``start`` everywhere."""
    return nn.Parameter(torch.full_like(like, start, device=device), requires_grad=like.requires_grad)
