"""Kernels are compared with the plain formula before their first use on a device, and left alone if they disagree."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0hooks import sparsify
from l0hooks.errors import L0HooksWarning
from l0hooks.gates.kernels import agreement, loading
from l0hooks.gates.kernels.loading import kernels_for, kernels_on
from l0hooks.gates.random import Native, Philox, stream

kernels = pytest.importorskip("l0hooks.gates.kernels.cpu")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_at_the_start() -> Iterator[None]:
    kernels_on.cache_clear()
    kernels_for.cache_clear()
    yield
    kernels_on.cache_clear()
    kernels_for.cache_clear()


def altered(change: Callable[[Any], Any], name: str) -> Callable[..., Any]:
    right = getattr(kernels, name)
    return lambda *args, **options: change(right(*args, **options))


def scaled(tensor: Tensor) -> Tensor:
    return tensor * 1.001


def one_wrong(tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] += 0.01
    return tensor


# a name: the function, what becomes of its result, and what is said of it
WRONG: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "noise": ("fill", scaled, "noise"),
    "one gate": ("gated", lambda found: (one_wrong(found[0]), found[1]), "the product with the gates"),
    "levels": ("gated", lambda found: (found[0], torch.zeros_like(found[1])), "the gradient of the weight"),
    "slopes": ("gated_backward", lambda found: (found[0], scaled(found[1])), "the gradient of the log-odds"),
    "not a number": ("count", lambda total: total * float("nan"), "the expected count"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_kernels_are_left_alone_with_one_warning(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change, what = WRONG[case]
    monkeypatch.setattr(kernels, name, altered(change, name))
    layer = nn.Linear(64, 64)
    sparsify(layer, "weight")
    with pytest.warns(L0HooksWarning, match=rf"(?s)gates on cpu: Numba kernels must.*got: {what}: a diff") as caught:
        layer(torch.randn(2, 64)).sum().backward()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 64)).sum().backward()
        assert isinstance(stream(1, 1000, CPU), Native)
    assert kernels_on(CPU) is None


def test_kernels_that_raise_an_error_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no instruction of that name\nand a long listing")

    monkeypatch.setattr(kernels, "gated", broken)
    with pytest.warns(L0HooksWarning, match="got: RuntimeError: no instruction of that name\n"):
        assert kernels_on(CPU) is None


def test_a_lack_of_memory_says_nothing_about_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(kernels, "gated", full)
    with pytest.raises(MemoryError):
        kernels_on(CPU)


def test_right_kernels_are_compared_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.device] = []

    def noted(module: object, device: torch.device) -> str:
        calls.append(device)
        return agreement.disagreement(module, device)

    monkeypatch.setattr(loading, "disagreement", noted)
    state = torch.get_rng_state()
    for count in (300, 5000):
        assert isinstance(stream(1, count, CPU), Philox)
    assert calls == [CPU]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_use_may_be_anywhere() -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert agreement.disagreement(kernels, CPU) == ""
    with torch.device("meta"):
        assert agreement.disagreement(kernels, CPU) == ""
    found: list[str] = []

    def mapped(x: Tensor) -> Tensor:
        found.append(agreement.disagreement(kernels, CPU))
        return x

    torch.vmap(mapped)(torch.zeros(2))
    torch.func.grad(lambda x: mapped(x).sum())(torch.zeros(2))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found.append(agreement.disagreement(kernels, CPU))
    finally:
        torch.set_default_dtype(default)
    assert found == [""] * 3


@pytest.mark.slow
def test_importing_the_library_compares_nothing() -> None:
    script = (
        "import sys, l0hooks, torch\n"
        "assert 'l0hooks.gates.kernels.cpu' not in sys.modules\n"
        "l0hooks.sparsify(torch.nn.Linear(64, 64), 'weight')\n"
        "assert 'l0hooks.gates.kernels.cpu' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
