"""The layers that are compared: dense, with our gates, and l0-python's where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor, nn

import l0hooks
from l0hooks.gates.kernels import loading

PEER = "l0-python" + (f" {version('l0-python')}" if importlib.util.find_spec("l0") else "")
STRENGTH, TEMPERATURE, START = 1e-6, 2 / 3, 0.95
NO_PEER = "l0-python is not installed: no column for it"


class Contender(NamedTuple):
    """A model, and its own L0 penalty if it has gates."""

    model: nn.Module
    penalty: Callable[[], Tensor] | None = None


def has_peer() -> bool:
    """Whether l0-python is installed."""
    return importlib.util.find_spec("l0") is not None


def has_kernels() -> bool:
    """Whether Numba is installed."""
    return importlib.util.find_spec("numba") is not None


def notes() -> list[str]:
    """What a table lacks, and whether Numba helped."""
    used = f"used, numba {version('numba')}" if has_kernels() else "not used"
    return [f"Numba's kernels: {used}", *([] if has_peer() else [NO_PEER])]


def ours(model: nn.Module, granularity: str = "weight") -> Contender:
    """``model`` with gates."""
    spec = l0hooks.GateSpec(granularity=granularity, temperature=TEMPERATURE, init_mean=START)
    l0hooks.sparsify(model, spec)
    return Contender(model, lambda: l0hooks.penalty(model, l0=STRENGTH))


def peers(shapes: Iterable[tuple[int, int]]) -> Contender:
    """l0-python's layers one after another, with the same start and temperature."""
    import l0

    layers = [l0.L0Linear(i, o, temperature=TEMPERATURE, init_sparsity=1 - START) for i, o in shapes]
    model = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    first, *rest = layers
    return Contender(model, lambda: STRENGTH * sum((one.get_l0_penalty() for one in rest), first.get_l0_penalty()))


def linears(shapes: list[tuple[int, int]]) -> dict[str, Contender]:
    """Name → contender, for a layer or several in a row."""

    def dense() -> nn.Module:
        layers = [nn.Linear(*shape) for shape in shapes]
        return layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    found = {"dense": Contender(dense()), "l0hooks": ours(dense())}
    return found | ({PEER: peers(shapes)} if has_peer() else {})


def training_step(contender: Contender, x: Tensor, *, adam: bool = False) -> Callable[[], None]:
    """Forward, penalty and backward; then Adam on all parameters, the gates' included, if asked for."""
    model, penalty = contender
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        (loss if penalty is None else loss + penalty()).backward()
        if adam:
            optimizer.step()

    return step


def without_kernels(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` as it runs where Numba is not installed."""

    def plain() -> None:
        before = loading.kernels_for, loading.kernels_on, loading.median_kernels_for
        loading.kernels_for = loading.median_kernels_for = lambda count, device: None
        loading.kernels_on = lambda device: None
        try:
            step()
        finally:
            loading.kernels_for, loading.kernels_on, loading.median_kernels_for = before

    return plain


def evaluation(contender: Contender, x: Tensor, mode: Callable[[], object] = torch.no_grad) -> Callable[[], None]:
    """One forward in evaluation mode."""
    model = contender.model.eval()

    def forward() -> None:
        with mode():
            model(x)

    return forward
