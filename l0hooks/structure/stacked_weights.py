"""Parameters that belong to no layer of torch: those that a module's own code multiplies, such as stacked experts."""

from __future__ import annotations

from torch import nn

from l0hooks._torch.modules import parametrization_lists, tensors_of
from l0hooks.errors import SpecError, explain
from l0hooks.structure.layers import GateLayout, Granularity, is_gateable

_BARE = ('"weight"', '"output"', "(rows, cols)")


def bare_weights(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters of three axes and more that a module owns that is no layer of torch, with their shapes.

    Parameters
    ----------
    module : nn.Module

    Examples
    --------
    >>> import torch
    >>> class Experts(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up = nn.Parameter(torch.zeros(4, 3, 2))
    >>> bare_weights(Experts()), bare_weights(nn.Linear(2, 2))
    ({'up': (4, 3, 2)}, {})
    """
    kind = type(module).__bases__[0] if parametrization_lists(module) else type(module)  # gates add a class of torch's
    if is_gateable(module) or kind.__module__.startswith("torch.nn."):
        return {}
    lazy = nn.parameter.UninitializedParameter
    own = [(name, t) for name, t in tensors_of(module) if not isinstance(t, lazy)]
    return {name: tuple(t.shape) for name, t in own if t.dim() > 2}


def stacked_weights(module: nn.Module) -> dict[str, int]:
    """The same, with the length of the first axis alone."""
    return {name: shape[0] for name, shape in bare_weights(module).items()}


def bare_layout(granularity: Granularity, shape: tuple[int, ...], *, where: str) -> GateLayout:
    """How gates lie over such a parameter: one for each number, for each index of the first axis, or for each block.

    Parameters
    ----------
    granularity : "weight", "output" or (rows, cols)
        Blocks lie in the last two axes.
    shape : tuple of int
    where : str
        The name that error messages start with.

    Raises
    ------
    SpecError
        If the granularity asks which axis is the input, or blocks do not divide the parameter.

    Examples
    --------
    >>> bare_layout("output", (4, 3, 2), where="experts").shape, bare_layout((3, 1), (4, 3, 2), where="experts").shape
    ((4,), (4, 1, 2))
    """
    if granularity == "weight":
        return GateLayout(shape)
    if granularity == "output":
        return GateLayout(shape[:1], f"a -> a{' 1' * (len(shape) - 1)}")
    if not isinstance(granularity, tuple):
        raise SpecError(
            explain(
                where,
                "of a parameter that is no layer's, nothing says which axis is read.",
                expected=" or ".join(_BARE),
                got=repr(granularity),
                hint="coupled gates, where experts and neurons are found: l0hooks.channel_groups",
            )
        )
    rows, cols = granularity
    *before, first, second = shape
    if first % rows or second % cols:
        raise SpecError(
            explain(
                where,
                "block sizes must divide the last two axes.",
                expected=f"rows dividing {first}, cols dividing {second}",
                got=granularity,
            )
        )
    names = "".join(f"n{axis} " for axis in range(len(before)))
    pattern = f"{names}a b -> {names}(a r) (b c)"
    return GateLayout((*before, first // rows, second // cols), pattern, (("r", rows), ("c", cols)))
