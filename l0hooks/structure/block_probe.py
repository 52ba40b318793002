"""What a module is called with and returns, and whether its output is its input plus something."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from l0hooks._torch.tensors import version

# Backward functions, without their number, that leave every element where it is or move whole axes
_PASSES = frozenset(
    {
        *("AddBackward", "SubBackward", "MulBackward", "DivBackward", "AddcmulBackward", "PowBackward"),
        *("ReluBackward", "ThresholdBackward", "GeluBackward", "SiluBackward", "HardtanhBackward", "TanhBackward"),
        *("NativeLayerNormBackward", "FusedRmsNormBackward", "NativeBatchNormBackward", "NativeGroupNormBackward"),
        *("CudnnBatchNormBackward", "MiopenBatchNormBackward", "NativeDropoutBackward"),
        *("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "ExpandBackward", "AliasBackward"),
        *("PermuteBackward", "TransposeBackward", "TBackward", "SqueezeBackward", "UnsqueezeBackward"),
        *("CloneBackward", "ToCopyBackward", "SliceBackward"),
    }
)
_SUMS = frozenset({"AddBackward", "AddcmulBackward"})


def is_sum_with(output: Tensor, source: Any) -> bool:
    """Whether ``output`` is a sum of what ``source`` computed and something else, perhaps normalised afterwards.

    Parameters
    ----------
    output : Tensor
        With a graph.
    source : node of the graph

    Examples
    --------
    >>> x = torch.ones(2, requires_grad=True).clone()
    >>> is_sum_with((x + 2 * x).relu(), x.grad_fn), is_sum_with(2 * x, x.grad_fn)
    (True, False)
    """
    found, seen = [(output.grad_fn, False)], set()
    while found:
        node, summed = found.pop()
        if node is source and summed:
            return True
        if node is None or node is source or (node, summed) in seen:
            continue
        seen.add((node, summed))
        kind = node.name().rstrip("0123456789")
        if kind not in _PASSES:
            continue
        parents = [parent for parent, _ in node.next_functions]
        is_sum = kind in _SUMS and sum(parent is not None for parent in parents) > 1
        found += [(parent, summed or is_sum) for parent in parents]
    return False


def first_name(module: nn.Module) -> str:
    """The name of the first parameter of ``module``'s forward; empty if it has none.

    Examples
    --------
    >>> first_name(nn.Linear(1, 1))
    'input'
    """
    try:
        return next(iter(inspect.signature(module.forward).parameters), "")
    except (TypeError, ValueError):  # compiled code has no signature
        return ""


def first_input(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module was called with first; None if it was called without that argument."""
    return args[0] if args else kwargs.get(name)


def first_output(output: Any) -> Any:
    """The output of a module, or the first of several."""
    return output[0] if type(output) in (tuple, list) and output else output


def with_first(output: Any, first: Tensor) -> Any:
    """``output`` with another first tensor.

    Examples
    --------
    >>> with_first((torch.zeros(1), None), torch.ones(1))
    (tensor([1.]), None)
    """
    return type(output)((first, *output[1:])) if type(output) in (tuple, list) else first


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes
    ----------
    problem : str
        Why its first output cannot stand in for its first input; empty if it can.
    is_sum : bool
        Whether its first output is its first input plus something.
    """

    problem: str
    is_sum: bool


class Probe:
    """Hooks that note every call of modules, with a graph from their input to their output.

    Attributes
    ----------
    calls : dict from name to list of Call
    """

    def __init__(self) -> None:
        self.calls: dict[str, list[Call]] = {}
        self._running: list[tuple[Any, Any, bool]] = []

    def attach(self, name: str, module: nn.Module) -> tuple[RemovableHandle, ...]:
        """Hook ``module``, whose calls are to be noted under ``name``."""
        first = first_name(module)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, grad = first_input(first, args, kwargs), torch.is_grad_enabled()
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_inference():
                self._running.append((None, None, grad))
                return None
            torch.set_grad_enabled(True)
            copied = (x if x.requires_grad else x.detach().requires_grad_()).clone()
            self._running.append((copied, version(copied), grad))
            return ((copied, *args[1:]), kwargs) if args else (args, {**kwargs, first: copied})

        def leave(_: nn.Module, __: object, output: Any) -> Any:
            copied, before, grad = self._running.pop()
            torch.set_grad_enabled(grad)
            result = first_output(output)
            problem = _problem(copied, before, result)
            is_sum = not problem and is_sum_with(result, copied.grad_fn)
            self.calls.setdefault(name, []).append(Call(problem, is_sum))
            return with_first(output, result.detach()) if not grad and isinstance(result, Tensor) else None

        return (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, prepend=True),
        )


def _problem(x: Any, before: Any, result: Any) -> str:
    """Why ``result`` cannot stand in for ``x``, whose version was ``before``; empty if it can."""
    if x is None or not isinstance(result, Tensor):
        return "its first input and output are not both tensors with a graph"
    if x.shape != result.shape or x.dtype != result.dtype or x.device != result.device:
        return f"it maps {tuple(x.shape)} of {x.dtype} to {tuple(result.shape)} of {result.dtype}"
    return "it changes its input in place" if version(x) != before else ""


class IdentityBlock:
    """A forward hook under which a block returns its first input in place of its first output."""

    def __init__(self) -> None:
        self._first = ""

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Hook ``module``."""
        self._first = first_name(module)
        return module.register_forward_hook(self.leave, with_kwargs=True, prepend=True)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output with the input as its first tensor."""
        return with_first(output, first_input(self._first, args, kwargs))
