"""The layers that can carry gates, and how an array of gates broadcasts to a weight.

The first axis of a weight counts all channels of one side; the second counts the channels of one group on the other:
``(g o) i …`` for Linear and Conv, ``(g i) o …`` for ConvTranspose, Embedding and Hugging Face's Conv1D.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import einops
import torch
from torch import Tensor, nn

from l0hooks._torch.modules import tensors_of
from l0hooks.errors import SpecError, UnsupportedModuleError, explain

Granularity = Literal["weight", "input", "output", "kernel", "coupled"] | tuple[int, int]
GRANULARITIES = ("weight", "input", "output", "kernel", "coupled")

_OUTPUT_FIRST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INPUT_FIRST = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
GATEABLE = "Linear, Conv, ConvTranspose, Embedding, MultiheadAttention and Hugging Face Conv1D layers"
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class WeightLayout:
    """The axes of a weight: whether outputs come first, and the number of ``groups`` in its first axis."""

    output_first: bool
    groups: int = 1


@dataclass(frozen=True)
class GateLayout:
    """How gates of ``shape`` broadcast to a weight: an einops pattern, or None for one gate per weight.

    Examples
    --------
    >>> layout = gate_layout("input", WeightLayout(output_first=True), torch.Size([4, 3]))
    >>> layout.shape, layout.spread(torch.arange(3.0)).shape
    ((3,), torch.Size([1, 3]))
    """

    shape: tuple[int, ...]
    pattern: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()

    def spread(self, gates: Tensor) -> Tensor:
        """The gates as a tensor that broadcasts with the weight."""
        if self.pattern is None:
            return gates
        return einops.repeat(gates, self.pattern, **dict(self.sizes))


def is_hugging_face_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' transposed Linear; never imports transformers."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_gateable(module: nn.Module) -> bool:
    """Whether gates can be attached to weights that ``module`` itself owns."""
    return isinstance(module, (*_OUTPUT_FIRST, *_INPUT_FIRST, nn.MultiheadAttention)) or is_hugging_face_conv1d(module)


def gateable_weights(name: str, module: nn.Module) -> list[tuple[nn.Module, str, WeightLayout]]:
    """The weights of a layer that can carry gates, as (owner, attribute, layout).

    Raises
    ------
    UnsupportedModuleError
        If the module has no such weight, or uses it in a way that gates do not support.
    """
    if isinstance(module, nn.MultiheadAttention):
        own = [(module, p, WeightLayout(True)) for p in _PROJECTIONS if p in dict(tensors_of(module))]
        return [*own, (module.out_proj, "weight", WeightLayout(True))]
    if isinstance(module, EMBEDDINGS) and (module.max_norm is not None or module.sparse):
        raise UnsupportedModuleError(
            explain(
                repr(name),
                "gates support neither max_norm, which rewrites the weight, nor sparse gradients, which bypass it.",
                got=f"max_norm={module.max_norm}, sparse={module.sparse}",
                hint="max_norm=None and sparse=False, or exclude it",
            )
        )
    if isinstance(module, _OUTPUT_FIRST):
        return [(module, "weight", WeightLayout(True, module.groups if isinstance(module, CONVOLUTIONS) else 1))]
    if isinstance(module, _INPUT_FIRST):
        return [(module, "weight", WeightLayout(False, module.groups if isinstance(module, TRANSPOSED) else 1))]
    if is_hugging_face_conv1d(module):
        return [(module, "weight", WeightLayout(False))]
    raise UnsupportedModuleError(
        explain(
            repr(name),
            f"gates attach to the weights of {GATEABLE}.",
            got=type(module).__name__ + ("" if list(tensors_of(module)) else ", which has no weight of its own"),
            hint="a pattern that matches layers inside it" if list(module.children()) else "exclude it",
        )
    )


def gate_layout(
    granularity: Granularity, weight: WeightLayout, shape: torch.Size, *, where: str = "gates"
) -> GateLayout:
    """How gates of ``granularity`` broadcast to a weight of ``shape``.

    Parameters
    ----------
    granularity : "weight", "input", "output", "kernel" or (rows, cols)
        Blocks have ``rows`` output and ``cols`` input channels and span the kernel.
    weight : WeightLayout
    shape : torch.Size
        At least two axes.
    where : str
        The name that error messages start with.

    Raises
    ------
    SpecError
        If blocks do not divide the weight.
    """
    if granularity == "weight":
        return GateLayout(tuple(shape))
    first, second = shape[0], shape[1]
    tail = " 1" * (len(shape) - 2)
    if granularity == "kernel":
        return GateLayout((first, second), f"a b -> a b{tail}")
    if isinstance(granularity, tuple):
        return _block_layout(granularity, weight, shape, tail, where)
    if (granularity == "output") == weight.output_first:
        return GateLayout((first,), f"a -> a 1{tail}")
    if weight.groups == 1:
        return GateLayout((second,), f"b -> 1 b{tail}")
    return GateLayout(
        (weight.groups * second,),
        f"(g b) -> (g a) b{tail}",
        (("g", weight.groups), ("a", first // weight.groups)),
    )


def _block_layout(block: tuple[int, int], weight: WeightLayout, shape: torch.Size, tail: str, where: str) -> GateLayout:
    first, second = shape[0], shape[1]
    rows, cols = block if weight.output_first else block[::-1]
    if (first // weight.groups) % rows or second % cols:
        outputs, inputs = (first // weight.groups, second) if weight.output_first else (second, first // weight.groups)
        raise SpecError(
            explain(
                where,
                "block sizes must divide the layer's channels (of one group).",
                expected=f"rows dividing {outputs} outputs, cols dividing {inputs} inputs",
                got=block,
            )
        )
    return GateLayout((first // rows, second // cols), f"a b -> (a r) (b c){tail}", (("r", rows), ("c", cols)))
