"""How often each weight is used in one pass over example inputs: the multiply-adds behind ``macs``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.tensors import beside, has_meta
from l0hooks.errors import SpecError, explain
from l0hooks.structure.layers import EMBEDDINGS, TRANSPOSED, is_gateable, tensors_of

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)  # no reason to believe that a model is wrong


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
                stack.enter_context(_shapes_alone())
            model(*beside(model, example_inputs))
        except RuntimeError as error:
            if not has_meta(model):
                raise
            raise _needs_data(error) from error
    return counts


def _shapes_alone() -> AbstractContextManager[object]:
    """Code that asks whether it is traced, before it looks at data, is told that it is."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # not for those who have data: it takes a while

    mode: AbstractContextManager[object] = FakeTensorMode(allow_non_fake_inputs=True)
    return mode


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode and the random state come back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    if any(training for _, training in modes):  # else what evaluation has kept stays kept
        model.eval()
    try:
        with torch.random.fork_rng(gpus), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def slow_attention() -> Iterator[None]:
    """torch's fused encoder path calls no submodule, so no hook would see it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


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
            channels = module.out_channels if isinstance(module, nn.modules.conv._ConvNd) else output.shape[-1]
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
