"""How often each weight is used in one pass over example inputs: the multiply-adds behind ``macs``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from l0hooks._torch.modules import tensors_of
from l0hooks._torch.running import evaluating, shapes_alone, slow_attention
from l0hooks._torch.tensors import beside, has_meta
from l0hooks.errors import SpecError, explain
from l0hooks.structure.layers import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED, is_gateable


def count_positions(model: nn.Module, example_inputs: Sequence[Any]) -> dict[tuple[int, str], float]:
    """Multiply-adds per weight element in one evaluation pass, keyed by (id of the module, tensor name).

    A convolution's weight works once for every output position (a transposed one: input position) of every example,
    a Linear's once for every row; padding counts as work. The model is left in the mode it was in.

    Parameters
    ----------
    model : nn.Module
    example_inputs : sequence
        Positional arguments of ``model``.

    Raises
    ------
    SpecError
        If ``example_inputs`` is a bare tensor, or the model is on the meta device and cannot be run there.
    """
    if isinstance(example_inputs, Tensor):
        raise SpecError(
            explain(
                "example_inputs",
                "the positional arguments must come as a tuple.",
                got="a Tensor",
                hint="example_inputs=(x,)",
            )
        )
    counts: dict[tuple[int, str], float] = {}

    def add(module: nn.Module, tensor_name: str, positions: float) -> None:
        key = (id(module), tensor_name)
        counts[key] = counts.get(key, 0) + positions

    with ExitStack() as stack:
        for module in model.modules():
            if is_gateable(module):
                handle = module.register_forward_hook(_counter(add), with_kwargs=True)
                stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(slow_attention())
        try:
            if has_meta(model):
                stack.enter_context(shapes_alone())
            model(*beside(model, example_inputs))
        except RuntimeError as error:
            if not has_meta(model):
                raise
            raise _needs_data(error) from error
    return counts


def _needs_data(error: RuntimeError) -> SpecError:
    """What to raise where a model on the meta device cannot be run."""
    return SpecError(
        explain(
            "example_inputs",
            "a model on the meta device is run without data.",
            expected="all its parameters and buffers there, and code that looks at shapes alone",
            got=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            hint="sparsify it after its weights are loaded, or without example inputs",
        )
    )


def total_macs(model: nn.Module, positions: Mapping[tuple[int, str], float]) -> float:
    """Multiply-adds of the whole model, from what :func:`count_positions` gave."""
    tensors = ((id(module), name, tensor) for module in model.modules() for name, tensor in tensors_of(module))
    return sum(positions.get((key, name), 0.0) * tensor.numel() for key, name, tensor in tensors)


def _counter(add: Callable[[nn.Module, str, float], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            _count_attention(add, module, args, kwargs)
        elif isinstance(module, EMBEDDINGS):
            add(module, "weight", 0)  # a look-up multiplies nothing
        elif isinstance(module, TRANSPOSED):
            seen = args[0] if args else kwargs["input"]
            add(module, "weight", seen.numel() // module.in_channels)
        else:
            channels = module.out_channels if isinstance(module, CONVOLUTIONS) else output.shape[-1]
            add(module, "weight", output.numel() // channels)

    return hook


def _count_attention(
    add: Callable[[nn.Module, str, float], None],
    module: nn.MultiheadAttention,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    names = ("query", "key", "value")
    query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
    tokens = [t.numel() // t.shape[-1] for t in (query, key, value)]
    # the packed projection has a third of its rows for each of the three
    add(module, "in_proj_weight", sum(tokens) / 3)
    for name, n in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), tokens, strict=True):
        add(module, name, n)
    add(module.out_proj, "weight", tokens[0])
