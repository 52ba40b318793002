"""Hooks that hide experts from the router that chooses among them, as if they were not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from l0hooks._torch.modules import buffers_of, hook_owners, parameters_of, unhook
from l0hooks._torch.trees import tree_map_only


@dataclass(frozen=True)
class Router:
    """The module that chooses experts, and how some of them can be hidden from it.

    Attributes
    ----------
    module : str
        Qualified name.
    rows : tuple of str
        The router's own tensors with a row for each expert. The router runs on the rows of open experts, and the
        indices that it returns are mapped back. Empty if the router returns logits and the code around it chooses:
        then the logits of hidden experts are −∞.
    counts : tuple of str
        The router's own attributes that hold the number of experts.
    fills : tuple of float or None
        For each tensor that a router with ``rows`` returns, what stands for hidden experts along its last axis; None
        if that axis does not count experts.

    Examples
    --------
    >>> Router("mlp.gate", rows=("weight",), fills=(float("-inf"), None, None)).logits
    False
    """

    module: str
    rows: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    fills: tuple[float | None, ...] = ()

    @property
    def logits(self) -> bool:
        """Whether experts are hidden in the logits that the router returns."""
        return not self.rows


@dataclass
class _Call:
    """What a running call has replaced in the router, and the rows that it sees."""

    rows: Tensor | None = None
    tensors: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)


class HiddenExperts:
    """A pair of forward hooks that hide experts from a router, one call after another.

    Parameters
    ----------
    router : Router
    opened : callable
        For the router's module, which experts are open: boolean, shape (experts,); None if all are.

    Examples
    --------
    >>> gate = nn.Linear(4, 3)
    >>> _ = HiddenExperts(Router(""), lambda _: torch.tensor([True, False, True])).attach(gate)
    >>> gate(torch.zeros(4))[1].item()
    -inf
    """

    def __init__(self, router: Router, opened: Callable[[nn.Module], Tensor | None]) -> None:
        self.router = router
        self.opened = opened
        self._call = _Call()

    def attach(self, module: nn.Module) -> tuple[RemovableHandle, ...]:
        """Hook ``module``, the router."""
        after = module.register_forward_hook(self.leave, always_call=True)
        if self.router.logits:
            return (after,)
        return module.register_forward_pre_hook(self.enter), after

    def enter(self, module: nn.Module, args: object) -> None:
        """Give the router the rows of open experts alone."""
        self._restore(module)
        opened = self.opened(module)
        if opened is None:
            return
        rows = self._call.rows = opened.nonzero().flatten()
        for name in self.router.rows:
            table: dict[str, Any] = parameters_of(module) if name in parameters_of(module) else buffers_of(module)
            self._call.tensors.append((table, name, table[name]))
            table[name] = table[name].index_select(0, rows.to(table[name].device))
        for name in self.router.counts:
            self._call.tensors.append((vars(module), name, vars(module)[name]))
            vars(module)[name] = len(rows)

    def leave(self, module: nn.Module, args: object, output: Any) -> Any:
        """Give the router back its rows, and the output its indices among all experts."""
        if self.router.logits:
            opened = None if output is None else self.opened(module)
            return output if opened is None else output.masked_fill(~opened.to(output.device), -torch.inf)
        rows = self._call.rows
        everything = self._restore(module)
        if rows is None or output is None:  # a call that raised an error has no output
            return output
        fills = iter(self.router.fills)
        return tree_map_only(Tensor, lambda t: _among_all(t, rows, everything, next(fills)), output)

    def _restore(self, module: nn.Module) -> int:
        """Put back what :meth:`enter` has replaced; returns the number of all experts."""
        count = 0
        for table, name, value in self._call.tensors:
            table[name] = value
            count = value.shape[0] if isinstance(value, Tensor) else count
        self._call = _Call()
        return count


def _among_all(value: Tensor, rows: Tensor, count: int, fill: float | None) -> Tensor:
    """What the router returned for open experts, as if it had seen all."""
    rows = rows.to(value.device)
    if fill is not None:
        return value.new_full((*value.shape[:-1], count), fill).index_copy(-1, rows, value)
    return value if value.is_floating_point() else rows.to(value.dtype)[value.long()]


def hidden_experts(model: nn.Module) -> list[tuple[nn.Module, HiddenExperts]]:
    """The routers below ``model`` that have such hooks, and the hooks.

    Examples
    --------
    >>> hidden_experts(nn.Linear(2, 2))
    []
    """
    return [(module, one) for module in model.modules() for one in hook_owners(module, HiddenExperts)]


def show_all(model: nn.Module) -> None:
    """Take the hooks away from all routers below ``model``, **in place**."""
    for module in model.modules():
        unhook(module, HiddenExperts)
