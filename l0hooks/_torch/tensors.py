"""Where tensors are stored: which share memory, which are sharded over processes, and which have no data."""

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
    """``example_inputs``, moved to the meta device if parameters of ``model`` are there.

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
    """A key that is equal for tensors of the same memory (on the meta device: storage), shape and strides."""
    if tensor.numel() == 0 or not (tensor.is_meta or tensor.data_ptr()):  # empty, or sharded over processes
        return (id(tensor),)
    if tensor.is_meta:
        return tensor.device, *storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that are not the :func:`same_tensor` as one before: tied parameters once."""
    return list({same_tensor(tensor): tensor for tensor in tensors}.values())


def storage_of(tensor: Tensor) -> tuple[bool, int]:
    """A key that is equal for tensors in one storage: its address, or on the meta device a number."""
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    return (True, address) if address else (False, _storage_number(storage))


def _number_of(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)


# torch has one Python object for each storage in use
_storage_number = _number_of if "_cdata" in dir(torch.UntypedStorage) else id


def _read_version(tensor: Tensor) -> object:
    return tensor._version


def _never_the_same(tensor: Tensor) -> object:
    return object()  # then nothing is reused


# equal while nothing changes the tensor in place; misses fused optimisers and changes through .data
version: Callable[[Tensor], object] = _read_version if "_version" in dir(Tensor) else _never_the_same


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``fully_shard`` has sharded ``tensor`` over processes."""
    return hasattr(tensor, "full_tensor")  # importing DTensor for isinstance takes a second


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, gathered by a collective call if it is sharded."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def is_placed(tensor: Tensor) -> bool:
    """Whether a tensor has memory: not if it is empty or on the meta device."""
    return tensor.numel() > 0 and not tensor.is_meta


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor, and the first address after it."""
    return tensor.data_ptr(), tensor.data_ptr() + _bytes_spanned(tensor)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors in one storage overlap: whether their ranges of bytes do."""
    a_start, b_start = (int(t.storage_offset()) * t.element_size() for t in (a, b))
    return a_start < b_start + _bytes_spanned(b) and b_start < a_start + _bytes_spanned(a)


def _bytes_spanned(tensor: Tensor) -> int:
    last = sum((int(n) - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def start_values(like: Tensor, start: float, device: torch.device) -> nn.Parameter:
    """A parameter of the shape of ``like`` that holds ``start`` everywhere."""
    return nn.Parameter(torch.full_like(like, start, device=device), requires_grad=like.requires_grad)


def replace_data(parameter: Tensor, data: Tensor, grad: Tensor | None = None) -> None:
    """Give a parameter or buffer data of another shape, **in place**, and a gradient for it.

    Graphs of earlier forwards may live on, and torch would use their accumulator again, which expects the old shape. It
    lets go of it when the dtype changes.

    Examples
    --------
    >>> weight = nn.Parameter(torch.ones(3))
    >>> loss = weight.sum()
    >>> replace_data(weight, torch.ones(2))
    >>> weight.sum().backward()
    >>> weight.grad
    tensor([1., 1.])
    """
    parameter.grad = None
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    if data.is_floating_point():
        parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
    parameter.grad = grad
