"""How often each weight is used for one example: the multiply-adds behind ``macs``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.modules import all_tensors
from l0hooks._torch.running import evaluating, shapes_alone, slow_attention
from l0hooks._torch.tensors import beside, has_meta
from l0hooks._torch.trees import tree_leaves
from l0hooks.errors import SpecError, UnsupportedModuleError, explain, in_one_line
from l0hooks.structure.example_inputs import ExampleInputs, positional
from l0hooks.structure.layers import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED, is_gateable, is_hugging_face_conv1d
from l0hooks.structure.stacked_weights import stacked_weights


def count_positions(model: nn.Module, example_inputs: ExampleInputs) -> dict[tuple[int, str], float]:
    """Multiply-adds per weight element for one example, in evaluation, keyed by (id of the module, tensor name).

    A convolution uses each weight once for every output position (a transposed one: input position), a Linear once
    for every row; padding is counted. Experts whose weights are stacked use them once for every token that chooses
    them, on average over the experts. The model stays in the mode it was in.

    Parameters
    ----------
    model : nn.Module
    example_inputs : sequence or mapping
        Arguments of ``model``. One example is one index along the first axis of the first tensor among them. Three
        other cases are recognised by the layer that reads it: all of a tensor without a batch (a vector for a Linear,
        one image for a convolution, one sequence for attention), one index along the second axis where attention has
        ``batch_first=False``, and one tensor of a list that the model stacks.

    Returns
    -------
    dict from (int, str) to float

    Raises
    ------
    SpecError
        If ``example_inputs`` are no arguments of the model, or it is on the meta device and cannot be run there.
    UnsupportedModuleError
        If a layer neither takes nor returns a tensor with its channels.
    """
    example_inputs = positional(model, example_inputs)
    counts: dict[tuple[int, str], float] = {}
    examples = _Examples(example_inputs)

    def add(module: nn.Module, tensor_name: str, positions: float) -> None:
        key = (id(module), tensor_name)
        counts[key] = counts.get(key, 0) + positions

    with ExitStack() as stack:
        for module in list(filter(is_gateable, model.modules())):
            handle = module.register_forward_hook(_counter(add, examples), with_kwargs=True)
            stack.callback(handle.remove)
        known = [(m, t) for _, m, _, t in all_tensors(model) if not isinstance(t, nn.parameter.UninitializedParameter)]
        stacked = {module for module, tensor in known if tensor.dim() > 2 and not is_gateable(module)}
        for module, stacks in [(m, found) for m in stacked if (found := stacked_weights(m))]:
            handle = module.register_forward_hook(_expert_counter(add, stacks), with_kwargs=True)
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
    return {key: count / examples.number for key, count in counts.items()}


class _Examples:
    """How many examples the inputs hold, as the layers that read them see it.

    Attributes
    ----------
    number : int, > 0
    """

    def __init__(self, example_inputs: Sequence[Any]) -> None:
        found = [(leaf, given) for given in example_inputs for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        self._first, given = found[0] if found else (torch.zeros(()), None)
        self._stacked = len(given) if isinstance(given, (list, tuple)) else None
        self._decided = False
        self.number = max(self._first.shape[0], 1) if self._first.ndim else 1

    def seen_by(self, module: nn.Module, seen: Tensor) -> None:
        """Take note of a layer's input: the first layer that reads the model's own as something else decides."""
        number = None if self._decided else self._as_read(module, seen)
        if number is not None:
            self._decided, self.number = True, number

    def _as_read(self, module: nn.Module, seen: Tensor) -> int | None:
        first = self._first
        if isinstance(module, nn.MultiheadAttention):
            if seen.ndim == 2 and first.ndim in (1, 2) and seen.shape[: first.ndim] == first.shape:
                return 1
            sequence_first = seen.ndim == 3 and not module.batch_first and seen.shape[:2] == first.shape[:2]
            return max(seen.shape[1], 1) if sequence_first else None
        without_batch = module.weight.ndim - 1 if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) else 1
        if seen.shape == first.shape and seen.ndim == without_batch:
            return 1
        if self._stacked and (seen.ndim, seen.shape[:1]) == (first.ndim + 1, (self._stacked,)):
            return self._stacked
        return None


def _needs_data(error: RuntimeError) -> SpecError:
    """The error to raise if a model on the meta device cannot be run."""
    return SpecError(
        explain(
            "example_inputs",
            "a model on the meta device must run without data.",
            expected="all parameters and buffers there, and code that needs shapes only",
            got=in_one_line(error),
            hint="sparsify it after its weights are loaded, or without example inputs",
        )
    )


def total_macs(model: nn.Module, positions: Mapping[tuple[int, str], float]) -> float:
    """Multiply-adds of the whole model, from the result of :func:`count_positions`."""
    tensors = all_tensors(model)
    return sum(positions.get((id(module), name), 0.0) * tensor.numel() for _, module, name, tensor in tensors)


def _counter(add: Callable[[nn.Module, str, float], None], examples: _Examples) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, EMBEDDINGS):
            add(module, "weight", 0)  # a look-up multiplies nothing
            return
        seen = args[0] if args else kwargs.get("query", next(iter(kwargs.values()), None))
        if isinstance(seen, Tensor):
            examples.seen_by(module, seen)
        if isinstance(module, nn.MultiheadAttention):
            _count_attention(add, module, args, kwargs)
        else:
            add(module, "weight", _rows(module, (args, kwargs), output))

    return hook


def _expert_counter(add: Callable[[nn.Module, str, float], None], stacks: Mapping[str, int]) -> Callable[..., None]:
    """Count the choices of experts that a module is given: those of all tokens, shared out evenly."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        chosen = [t.numel() for t in given if t.dtype in (torch.int64, torch.int32)]
        for name, count in stacks.items() if chosen else ():
            add(module, name, chosen[0] / count)

    return hook


def _rows(module: nn.Module, given: object, returned: object) -> int:
    """How often a layer has used its weight in one call: a subclass may take or return several tensors."""
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        axis = -1 - len(module.kernel_size)
        sides = [(given, module.in_channels)] if isinstance(module, TRANSPOSED) else [(returned, module.out_channels)]
    else:
        names = ("nx", "nf") if is_hugging_face_conv1d(module) else ("in_features", "out_features")
        inputs, outputs = (int(vars(module)[name]) for name in names)
        axis, sides = -1, [(returned, outputs), (given, inputs)]
    for values, channels in sides:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and tensor.dim() >= -axis and tensor.shape[axis] == channels:
                return tensor.numel() // channels
    raise UnsupportedModuleError(
        explain(
            f"multiply-adds of a {type(module).__name__}",
            "a layer must take or return a tensor with its channels, by which its calls are counted.",
            expected=f"a tensor with {sides[0][1]} channels along axis {axis}",
            got=f"it returned {type(returned).__name__}",
        )
    )


def _count_attention(
    add: Callable[[nn.Module, str, float], None],
    module: nn.MultiheadAttention,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    names = ("query", "key", "value")
    query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
    tokens = [t.numel() // t.shape[-1] for t in (query, key, value)]
    # a third of the rows of the packed projection belongs to each of query, key and value
    add(module, "in_proj_weight", sum(tokens) / 3)
    for name, n in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), tokens, strict=True):
        add(module, name, n)
    add(module.out_proj, "weight", tokens[0])
