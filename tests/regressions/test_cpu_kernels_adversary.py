"""Attacks on Numba's kernels: memory they must not touch, threads that end early, a Numba that is broken."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_product import gated_by
from torch import Tensor

from l0hooks import Gate
from l0hooks.gates import hard_concrete as hc
from l0hooks.gates.constants import Constants
from l0hooks.gates.expected_count import expected_count
from l0hooks.gates.kernels.loading import kernels_for, kernels_on
from l0hooks.gates.noise import _mixed
from l0hooks.gates.random import Native, stream
from l0hooks.gates.sampling import gated_weight

pytest.importorskip("numba")
from l0hooks.gates.kernels import cpu as kernels
from l0hooks.gates.kernels import threads as compiled

CPU, SIDE = torch.device("cpu"), 64
CONSTANTS = Constants()
Hook = Callable[[Tensor], Tensor]


def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    weight, log_alpha = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    return weight.requires_grad_(), log_alpha.requires_grad_()


def same(tensor: Tensor) -> Tensor:
    return tensor


def slopes(pack: Hook = same, unpack: Hook = same, hook: Hook | None = None) -> tuple[Tensor, ...]:
    weight, log_alpha = pair()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        product = gated_by(kernels, weight, log_alpha, CONSTANTS)
    if hook is not None:
        product.register_hook(hook)
    return torch.autograd.grad(product, (weight, log_alpha), torch.linspace(-1, 1, SIDE * SIDE).view(SIDE, SIDE))


@pytest.mark.parametrize(
    ("pack", "unpack", "off"),
    [
        (lambda t: t.t().contiguous(), lambda t: t.t(), 1e-5),
        (lambda t: t.double() if t.is_floating_point() else t.long(), same, 1e-5),
        (lambda t: t if t.is_floating_point() else t.long(), same, 0),
        (lambda t: t.bfloat16() if t.is_floating_point() else t, same, 0.02),
        (lambda t: t.detach().clone(), same, 0),
    ],
    ids=["other strides", "wider", "wider levels", "narrower", "copies"],
)
def test_saved_tensors_may_come_back_in_another_form(pack: Hook, unpack: Hook, off: float) -> None:
    for got, want in zip(slopes(pack, unpack), slopes(), strict=True):
        torch.testing.assert_close(got, want, rtol=off, atol=off)


@pytest.mark.parametrize("hook", [lambda g: torch._neg_view(-g), lambda g: torch._efficientzerotensor(g.shape)])
def test_a_gradient_that_is_not_what_lies_at_its_address(hook: Hook) -> None:
    for got, want in zip(slopes(hook=hook), slopes(hook=lambda g: hook(g).clone()), strict=True):
        torch.testing.assert_close(got + 0, want + 0, rtol=1e-5, atol=1e-6)


def test_a_penalty_is_owed_where_saved_tensors_come_back_in_another_form() -> None:
    side, found = 192, []
    for pack in (same, torch.Tensor.double):
        log_alpha = torch.zeros(side, side, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, p=pack: p(t) if t.is_floating_point() else t, same):
            product = gated_by(kernels, torch.ones(side, side), log_alpha, CONSTANTS)
        node = product.grad_fn
        assert node is not None
        (product.sum() + 5 * expected_count(log_alpha, CONSTANTS, weakref.ref(node))).backward()
        assert log_alpha.grad is not None
        found.append(log_alpha.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "weight",
    [torch.empty(SIDE, SIDE, device="meta"), torch.ones(SIDE, SIDE + 1), torch.ones(1000, 1000)],
    ids=["meta", "another shape", "larger"],
)
def test_a_weight_that_does_not_match_its_gates_is_an_error(weight: Tensor) -> None:
    log_alpha = torch.zeros(SIDE, SIDE)
    assert not kernels.fits(weight, log_alpha)
    with pytest.raises(RuntimeError):
        gated_weight(weight, log_alpha, 1, Constants())


def test_a_lazily_negated_weight() -> None:
    weight, log_alpha = torch._neg_view(torch.ones(SIDE, SIDE)), torch.full((SIDE, SIDE), 30.0)
    product = gated_weight(weight, log_alpha, 1, Constants())
    assert torch.equal(product, -torch.ones(SIDE, SIDE))


class Wrapped(Tensor):
    """A tensor without memory of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        def unwrap(x: object) -> object:
            return x.inner if isinstance(x, Wrapped) else x

        def wrap(x: object) -> object:
            return Wrapped(x) if isinstance(x, Tensor) else x

        tree_map = torch.utils._pytree.tree_map
        return tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {})))


def test_tensors_without_memory_of_their_own() -> None:
    inner = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    count = expected_count(Wrapped(inner), CONSTANTS)
    assert isinstance(count, Wrapped)
    torch.testing.assert_close(count.inner, hc.keep_prob(inner, *CONSTANTS).sum())
    drawn = stream(9, 1000, CPU).uniform_(Wrapped(torch.empty(1000)))
    assert isinstance(drawn, Wrapped)
    assert torch.equal(drawn.inner, stream(9, 1000, CPU).uniform_(torch.empty(1000)))


def test_a_penalty_of_sharded_gates_is_not_left_to_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathering them is a node of its own, which a gradient of None is nothing for."""
    gate, asked = Gate(40_000), []
    monkeypatch.setattr("l0hooks.gates.gate.is_sharded", lambda tensor: True)
    monkeypatch.setattr("l0hooks.gates.gate.whole", same)
    monkeypatch.setattr("l0hooks.gates.gate.expected_count", lambda *arguments: asked.append(arguments[-1]))
    product = gated_by(kernels, torch.ones(40_000), gate.log_alpha, CONSTANTS)
    gate.last_sample.note(product)
    gate.expected_l0()
    assert asked == [None]


# --- threads ----------------------------------------------------------------------------------------------------------


def test_an_interruption_waits_for_threads_that_still_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(compiled, "SHARE", 1)
    main, begun, over = threading.current_thread(), [], []
    under_way = threading.Event()

    def run(at: int, n: int) -> None:
        if threading.current_thread() is main:
            under_way.wait(5)
            raise KeyboardInterrupt
        begun.append(at)
        under_way.set()
        time.sleep(0.1)
        over.append(at)

    with pytest.raises(KeyboardInterrupt):
        compiled.share_out(3, 1, run)
    assert begun
    assert sorted(begun) == sorted(over)


def test_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(compiled, "SHARE", 1)
    monkeypatch.setattr(compiled, "_threads", compiled._Threads())

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    shares: list[tuple[int, int]] = []
    compiled.share_out(7, 1, lambda at, n: shares.append((at, n)))
    assert sorted(shares) == [(0, 3), (3, 3), (6, 1)]


def test_an_error_in_a_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(compiled, "SHARE", 1)
    main, failed = threading.current_thread(), threading.Event()

    def run(at: int, n: int) -> None:
        if threading.current_thread() is main:
            assert failed.wait(5)
        else:
            failed.set()
            raise ValueError("in a thread")

    with pytest.raises(ValueError, match="in a thread"):
        compiled.share_out(2, 1, run)


@pytest.mark.slow
def test_training_goes_on_while_the_interpreter_ends() -> None:
    script = (
        "import atexit, torch\n"
        "from l0hooks.gates.kernels import cpu as k\n"
        "torch.set_num_threads(2)\n"
        "draw = lambda: k.fill(torch.empty(2**18), 7, 0)\n"
        "first = draw()\n"
        "atexit.register(lambda: print(torch.equal(draw(), first)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("True", "")


@pytest.mark.parametrize("wrong", ["raise ImportError('it needs an older NumPy')", "import llvmlite_is_missing", ""])
def test_without_a_numba_that_works_gates_are_drawn_by_torch(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cpu", "threads"):
        monkeypatch.delitem(sys.modules, f"l0hooks.gates.kernels.{name}")
    if wrong:
        (tmp_path / "numba.py").write_text(wrong)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "numba")
    else:
        monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    kernels_on.cache_clear()
    kernels_for.cache_clear()
    assert isinstance(stream(1, 1000, CPU), Native)
    (told,) = caplog.records
    assert told.levelname == "WARNING"
    assert "gates on cpu run without Numba kernels: the package numba cannot be imported" in told.message
    kernels_on.cache_clear()
    kernels_for.cache_clear()


# --- what held --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [0, 1])
def test_a_change_in_place_between_forward_and_backward_is_an_error(changed: int) -> None:
    arguments = pair()
    loss = gated_by(kernels, *arguments, CONSTANTS).sum()
    with torch.no_grad():
        arguments[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_noise_of_layers_and_neighbouring_seeds_is_uncorrelated() -> None:
    count = 1 << 18
    drawn = torch.stack(
        [
            stream(_mixed(torch.tensor(seed), i), count, CPU).uniform_(torch.empty(count))
            for seed in (5, 6, 2**61)
            for i in range(3)
        ]
    )
    correlations = torch.corrcoef(drawn).fill_diagonal_(0)
    assert float(correlations.abs().max()) * count**0.5 < 5
    assert float(torch.corrcoef(torch.stack([drawn[0, 1:], drawn[0, :-1]]))[0, 1].abs()) * count**0.5 < 5


def test_many_threads_at_once_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(compiled, "SHARE", kernels.BLOCK)
    weight, log_alpha, count = torch.randn(60_001), torch.randn(60_001), 6
    expected = [kernels.gated(weight, log_alpha, i, 3, (1.5, -0.1, 1.2))[0] for i in range(count)]
    same_bits: list[bool] = []

    def work(i: int) -> None:
        for _ in range(20):
            same_bits.append(torch.equal(kernels.gated(weight, log_alpha, i, 3, (1.5, -0.1, 1.2))[0], expected[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(same_bits) == 20 * count
    assert all(same_bits)
