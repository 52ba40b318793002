"""Parameters in an exported graph, and where their axes stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from l0hooks.structure.fx_nodes import name_of


@dataclass
class Parameter:
    """A parameter or floating-point buffer under all its names, with the labels of its axes or of its elements.

    Attributes
    ----------
    names : list of str
        Qualified names; several if tied.
    shape : torch.Size
    is_buffer : bool
    axes : list of Tensor
        Labels along each axis; empty until an operator uses the tensor as a weight or a vector.
    elements : Tensor or None
        Labels of single elements; None until an operator uses the tensor as an activation.
    read_axis : set of int
        Axes along which Linear and convolution layers read channels.
    """

    names: list[str]
    shape: torch.Size
    is_buffer: bool
    axes: list[Tensor] = field(default_factory=list)
    elements: Tensor | None = None
    read_axis: set[int] = field(default_factory=set)

    @property
    def is_used(self) -> bool:
        """Whether an operator of the graph uses the tensor."""
        return bool(self.axes) or self.elements is not None


@dataclass
class Reference:
    """A parameter in the graph, with its axes in ``order``; -1 is an axis of length 1 that it does not have."""

    parameter: Parameter
    order: tuple[int, ...]


def moved(reference: Reference, node: fx.Node, shape: torch.Size) -> Reference:
    """A parameter of ``shape`` with its axes in another order, without some of length 1, or with another of these."""
    order, name = list(reference.order), name_of(node)
    if name == "unsqueeze":
        order.insert(int(node.args[1]) % (len(order) + 1), -1)  # type: ignore[arg-type]
    elif name == "squeeze":
        asked: Any = node.args[1] if len(node.args) > 1 else list(range(len(order)))
        dims = {d % len(order) for d in ([asked] if isinstance(asked, int) else asked)}
        order = [d for axis, d in enumerate(order) if axis not in dims or shape[axis] != 1]
    else:
        sizes = torch.empty(tuple(range(1, len(order) + 1)), device="cpu")
        order = [order[n - 1] for n in node.target(sizes, *node.args[1:]).shape]  # type: ignore[operator]
    return Reference(reference.parameter, tuple(order))
