"""A gate for a whole residual block: out = x + z·(out − x), by a forward hook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from l0hooks._torch.modules import children_of, drop_load_hooks, unhook
from l0hooks._torch.tensors import is_meta
from l0hooks.errors import StateError, explain
from l0hooks.gates.gate import Gate
from l0hooks.gates.shared_sampling import SharedSampling
from l0hooks.structure.block_probe import first_input, first_name, first_output, with_first
from l0hooks.structure.blocks import Block
from l0hooks.structure.group_costs import CoupledPlan

CHILD = "layer_gate"  # the name of the gate's module in its block


class LayerGate(Gate):
    """The gate of one block, shape (1,): in evaluation it is exactly 1 or exactly 0.

    Attributes
    ----------
    rivals : tuple of LayerGate
        All gates of a list that must not become empty: of these the one with the largest log-odds stays. Empty if
        the list may.
    """

    rivals: tuple[LayerGate, ...] = ()

    def value(self, log_alpha: Tensor | None = None, *, support: Tensor | None = None) -> Tensor:
        """1 if the gate stays, else 0: float32, shape (1,), constant."""
        location = self.log_alpha.detach() if log_alpha is None else log_alpha.detach()
        if support is None:
            support = self.stays_alone(location) if self.rule is None else self.support()
        return support.to(torch.float32)

    def stays_alone(self, log_alpha: Tensor, median: Tensor | None = None) -> Tensor:
        """Whether the gate stays where no rule decides; the first of the largest does if no other in its list does."""
        stays = super().stays_alone(log_alpha, median)
        if not self.rivals or any(is_meta(one.log_alpha) for one in self.rivals):
            return stays
        device = log_alpha.device
        together = torch.cat([one.log_alpha.detach().to(device) for one in self.rivals])
        others = torch.cat([Gate.stays_alone(one, one.log_alpha.detach()).to(device) for one in self.rivals])
        own = next(number for number, one in enumerate(self.rivals) if one is self)
        return stays | (~others.any() & (together.argmax() == own))


class BlockGate(nn.Module):
    """The gate of a block, as a child of it; the block's output is x + z·(out − x).

    Parameters
    ----------
    gate : LayerGate
    plan : CoupledPlan
        That holds the block.
    number : int
        The block's, among the blocks of ``plan``.
    shared : SharedSampling
        All gates of blocks, which are sampled together.
    example_noise : bool
        One draw for each example, along axis 0 of the block's input, rather than one for a forward.
    """

    def __init__(
        self, gate: LayerGate, plan: CoupledPlan, number: int, shared: SharedSampling, *, example_noise: bool
    ) -> None:
        super().__init__()
        self.gate = gate
        self.plan = plan
        self.number = number
        self.example_noise = example_noise
        self._shared = shared
        self._first = ""

    @property
    def block(self) -> Block:
        """What the gate opens and closes."""
        return self.plan.blocks[self.number]

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        """``x``: a block that is a ``Sequential`` runs this like any other entry."""
        return x

    def attach(self, module: nn.Module) -> tuple[RemovableHandle | Child, ...]:
        """Make this a child of ``module``, the block, and multiply its output."""
        self._first = first_name(module)
        self.train(module.training)
        module.add_module(CHILD, self)
        loads = module.register_load_state_dict_pre_hook(accept_dense_block)  # type: ignore[no-untyped-call]
        return Child(module), module.register_forward_hook(self.multiply, with_kwargs=True, prepend=True), loads

    def multiply(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The block's output with x + z·(out − x) as its first tensor: exactly out if z = 1, exactly x if z = 0."""
        x, out = first_input(self._first, args, kwargs), first_output(output)
        if not isinstance(x, Tensor) or not isinstance(out, Tensor) or x.shape != out.shape:
            raise StateError(
                explain(
                    f"block {self.block.name!r}",
                    "a block with a gate maps its first input to an output of the same shape.",
                    expected=f"a tensor, as its first argument or as {self._first!r}",
                    got=f"{_described(x)} → {_described(out)}",
                    hint="call it as with the example inputs",
                )
            )
        x = x.to(out.dtype)
        if not self.training:
            return with_first(output, torch.where(self.gate.value() > 0, out, x))
        examples = x.shape[0] if self.example_noise and x.dim() else None
        z = self._shared.sample(self.gate, examples).to(out.dtype)
        z = z.view(() if examples is None else (-1, *(1 for _ in x.shape[1:])))
        return with_first(output, torch.lerp(x, out, z))


def accept_dense_block(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
    """Let a checkpoint without any gates load into a block with one, which does not change then."""
    if not any(f"{CHILD}." in key or "parametrizations." in key for key in state_dict if key.startswith(prefix)):
        for _name, _block, child in block_gates([("", module)]):
            for key, value in child.state_dict(prefix=f"{prefix}{CHILD}.").items():
                state_dict.setdefault(key, value)


class Child:
    """A gate's place in its block, which can be removed again."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def remove(self) -> None:
        """Take the gate away."""
        delattr(self.block, CHILD)


def block_gates(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module, BlockGate]]:
    """The gates of blocks among named modules: name of the block, the block, and its gate."""
    for name, module in modules:
        child = dict(children_of(module)).get(CHILD)
        if isinstance(child, BlockGate):
            yield name, module, child


def remove_block_gates(model: nn.Module) -> None:
    """Take the gates of blocks away, **in place**."""
    for _, module, _ in list(block_gates(list(model.named_modules()))):
        Child(module).remove()
        unhook(module, BlockGate)
        drop_load_hooks(module, accept_dense_block)


def _described(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
