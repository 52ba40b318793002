"""Fresh memory and pieces of arrays."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from l0hooks._torch import memory
from l0hooks._torch.memory import PIECE, fresh, fresh_like, pieces

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 2**15])
def test_fresh_memory_is_an_ordinary_tensor(dtype: torch.dtype, rows: int) -> None:
    tensor = fresh((rows, 64), dtype, CPU)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((rows, 64), dtype, True)
    assert not tensor._is_view()
    assert not tensor.requires_grad
    tensor.fill_(3).requires_grad_()
    (2 * tensor).sum().backward()
    assert tensor.grad is not None
    assert float(tensor.detach().sum()) == (float("inf") if dtype == torch.float16 and rows > 2 else 3 * rows * 64)


def test_two_are_never_the_same_memory() -> None:
    one, other = (fresh((2**21,), torch.float32, CPU).fill_(n) for n in (1, 2))
    assert float(one.min()) == 1
    assert float(other.max()) == 2


COUNT = 2**19 + 64  # of a size of its own


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[5:],
        lambda tensor: tensor.view(torch.int32),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: tensor.numpy(),
        lambda tensor: torch.utils.dlpack.to_dlpack(tensor),
        lambda tensor: (torch.ones(COUNT, requires_grad=True) * tensor).grad_fn,
    ],
    ids=["tensor", "slice", "other dtype", "storage", "NumPy", "DLPack", "saved for backward"],
)
def test_memory_is_used_again_when_nobody_holds_it_and_not_before(hold: Callable[[torch.Tensor], object]) -> None:
    memory._free.clear()
    holder = hold(fresh((COUNT,), torch.float32, CPU))
    gc.collect()
    assert 4 * COUNT not in memory._free
    del holder
    gc.collect()
    ((block,),) = (blocks for size, blocks in memory._free.items() if size == 4 * COUNT)
    again = fresh((COUNT,), torch.float32, CPU)
    assert again.data_ptr() == block.ctypes.data
    assert not memory._free[4 * COUNT]


def test_little_memory_is_kept() -> None:
    memory._free.clear()
    for count in (2**24, *(2**20 + 64 * n for n in range(40))):
        fresh((count,), torch.float32, CPU)
        assert sum(size * len(blocks) for size, blocks in memory._free.items()) <= memory._MAX_RETAINED
    assert 4 * 2**24 not in memory._free


@pytest.mark.parametrize("shape", [(4, 6), (2**11, 2**11)])
def test_memory_like_a_transposed_array_has_its_strides(shape: tuple[int, int]) -> None:
    tensor = torch.empty(shape).t()
    assert fresh_like(tensor).stride() == tensor.stride()
    assert fresh_like(tensor.t()).is_contiguous()


def test_pieces_cover_the_arrays_in_order_and_are_views() -> None:
    one, other = torch.arange(2 * PIECE + 3), torch.zeros(2 * PIECE + 3, dtype=torch.long)
    for a, nothing, b in pieces(one, None, other):
        assert nothing is None
        b.copy_(a)
    assert torch.equal(one, other)


@pytest.mark.parametrize("small", [True, False])
def test_a_small_array_and_one_with_other_strides_come_whole(small: bool) -> None:
    tensor = torch.empty(4, 3) if small else torch.empty(2 * PIECE, 2).t()
    ((whole,),) = pieces(tensor)
    assert whole is tensor
