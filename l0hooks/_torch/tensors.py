"""Where tensors lie: which of them are one, which are spread over processes, and which have no data yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.trees import tree_map_only


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
    moved: tuple[Any, ...] = tree_map_only(Tensor, lambda t: t.to("meta"), inputs)
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
    return (True, address) if address else (False, _storage_number(storage))


def _number_of(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)


# torch keeps one Python object for each storage that lives
_storage_number = _number_of if "_cdata" in dir(torch.UntypedStorage) else id


def _read_version(tensor: Tensor) -> object:
    return tensor._version


def _never_the_same(tensor: Tensor) -> object:
    return object()  # nothing is used twice then


# equal as long as nothing has changed the tensor in place, but for fused optimisers and changes through .data
version: Callable[[Tensor], object] = _read_version if "_version" in dir(Tensor) else _never_the_same


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``fully_shard`` has spread ``tensor`` over processes."""
    return hasattr(tensor, "full_tensor")  # importing DTensor, to ask for its type, takes a second


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, or all of one that is sharded; a collective call then."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def is_placed(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own to be known by: not if it is empty, or a meta tensor."""
    return tensor.numel() > 0 and not tensor.is_meta


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor, and the first one after it."""
    return tensor.data_ptr(), tensor.data_ptr() + _bytes_spanned(tensor)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors in one storage share an element: whether their ranges of bytes meet."""
    a_start, b_start = (int(t.storage_offset()) * t.element_size() for t in (a, b))
    return a_start < b_start + _bytes_spanned(b) and b_start < a_start + _bytes_spanned(a)


def _bytes_spanned(tensor: Tensor) -> int:
    last = sum((int(n) - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def start_values(like: Tensor, start: float, device: torch.device) -> nn.Parameter:
    """A parameter of the shape of ``like`` that holds ``start`` everywhere."""
    return nn.Parameter(torch.full_like(like, start, device=device), requires_grad=like.requires_grad)
