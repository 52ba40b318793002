"""``Gate``: learnable log-odds, their noise, and the one rule that says which gates stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.autograd import LastSample, is_traced
from l0hooks._torch.memory import pieces
from l0hooks._torch.tensors import is_meta, is_sharded, whole
from l0hooks.gates import optimizer_hooks, saved_state  # noqa: F401  hooks around every step from now on
from l0hooks.gates.constants import GAMMA, ZETA, Constants, check_constants
from l0hooks.gates.expected_count import expected_count
from l0hooks.gates.families import FamilyName, HardConcreteFamily
from l0hooks.gates.log_odds import Estimator, LogOdds
from l0hooks.gates.noise import GateNoise, NoiseSource
from l0hooks.gates.protocols import Rule
from l0hooks.gates.random import Stream
from l0hooks.gates.registry import register
from l0hooks.gates.sampling import sampled
from l0hooks.gates.selected_stream import SelectedStream


class Gate(LogOdds):
    r"""Learnable gates z in [0, 1] over an array of any shape.

    In training ``gate()`` samples, in evaluation it returns the test-time gates, exactly zero outside
    :meth:`support`. The log-odds live in float32 whatever the model's dtype, and are projected to the family's
    limits after every optimiser step.

    Parameters
    ----------
    shape : int or sequence of int
        Shape of the gates.
    family : "hard_concrete", "straight_through", "stg" or "deterministic"
    init_mean : float in (0, 1), optional
        E[z] at the start; 0.95 if ``init_keep_prob`` is not given either.
    init_keep_prob : float in (0, 1), optional
        P(z ≠ 0) at the start; not together with ``init_mean``.
    temperature : float, > 0, optional
        β (the noise's standard deviation for "stg"); the family's default if not given.
    gamma, zeta : float, gamma < 0, zeta > 1
        Stretch interval.
    estimator : "median", "paper" or "mean"
        The test-time gate.
    device : torch.device, optional

    Attributes
    ----------
    noise_source : GateNoise
        Where the noise comes from: a source of its own, or the model's, where gates of one forward share a seed.
    rule : Rule or None
        What decides which gates stay; None if each gate does by itself.
    multipliers : Parameter or None
        The Lagrange multipliers of a budget, at the first of its gates.
    last_sample : LastSample
        Which node of the graph multiplied a weight with the gates last.
    schedule, scheduled_steps : function from a step to a temperature or None, int
        What the temperature follows, and how many steps of the optimiser it has taken.
    start : float
        The log-odds that all gates started with, and start with again when they come from the meta device.

    Raises
    ------
    InvalidValueError
        If a value is out of range, or both starts are given.

    Examples
    --------
    >>> gate = Gate(3, init_keep_prob=0.5).eval()
    >>> gate.keep_prob()
    tensor([0.5000, 0.5000, 0.5000], grad_fn=<SigmoidBackward0>)
    >>> gate.expected_l0().item()
    1.5

    References
    ----------
    Louizos, Welling & Kingma (2018), section 2.2.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        family: FamilyName = "hard_concrete",
        init_mean: float | None = None,
        init_keep_prob: float | None = None,
        temperature: float | None = None,
        gamma: float = GAMMA,
        zeta: float = ZETA,
        estimator: Estimator = "median",
        device: torch.device | str | None = None,
    ) -> None:
        start, constants = (init_mean, init_keep_prob), (temperature, gamma, zeta)
        super().__init__(shape, family, start, constants, estimator, device)
        self.schedule: Callable[[int], float] | None = None
        self.scheduled_steps = 0
        self.noise_source = GateNoise(NoiseSource().add_entry("", ()), 0)
        self.rule: Rule | None = None
        self.mask: Tensor | None = None  # the rule's: which gates stay, and, once they are fixed, their values
        self.held: Tensor | None = None
        self.last_sample = LastSample()
        self._key = register(self)

    def forward(self) -> Tensor:
        """The gates: a sample in training, the test-time gates in evaluation; float32, shape of ``log_alpha``."""
        return self.sample() if self.training else self.value()

    def noise(self, examples: int | None = None) -> Tensor:
        """Uniform noise of the running forward, in fresh memory: shape of ``log_alpha``, ``examples`` before it."""
        noise = self.noise_source.uniform(self._like(examples))
        return noise if self.positions is None else noise.index_select(-1, self.positions)

    def stream(self, examples: int | None = None) -> Stream:
        """The same noise as :meth:`noise`, to be drawn in pieces."""
        every = self.noise_source.stream(self._like(examples))
        return every if self.positions is None else SelectedStream(every, self.drawn, self.positions)

    @property
    def shared(self) -> dict[object, Any] | None:
        """What the running forward computes once for several places; None outside every forward."""
        source = self.noise_source.source
        return None if source.owner is None else source.shared

    def sample(self, examples: int | None = None) -> Tensor:
        """Gates with the noise of the running forward, differentiable; for each example if ``examples`` is given.

        Once a rule has fixed the support they are its final values, without noise and with a gradient of zero.
        """
        if self.rule is not None and self.rule.finished:
            held = self.final() + 0 * self.log_alpha  # distributed training wants to see every parameter used
            return held if examples is None else held.expand(examples, *held.shape)
        if self.noiseless is not None:
            median = self.family.median(self.log_alpha, self.temperature)
            return median if examples is None else median.expand(examples, *median.shape)
        if self.constants is not None and self.positions is None and not is_traced():
            return sampled(self.log_alpha, self.stream(examples), self.constants, examples)
        return self.family.sample(self.log_alpha, self.noise(examples), self.temperature)

    def value(self, log_alpha: Tensor | None = None, *, support: Tensor | None = None) -> Tensor:
        """The test-time gates, differentiable, exactly zero outside :meth:`support`.

        ``log_alpha`` may be given in place of the gate's own, with equal values; ``support`` is one that the rule will
        have later.
        """
        location = whole(self.log_alpha) if log_alpha is None else log_alpha
        z = self.estimate(location)
        if support is not None:
            stays = support
        elif self.rule is None:
            stays = self.stays_alone(location.detach(), z.detach() if self.estimator == "median" else None)
        else:
            stays = self.support()
        return torch.where(stays, z if self.rule is None else z.clamp(min=self.family.least_open), 0.0)

    def final(self) -> Tensor:
        """The values that a rule has fixed: float32, shape of ``log_alpha``, constant."""
        self._refresh()
        return self.value().detach() if self.held is None else self.held

    def support(self) -> Tensor:
        """Which gates stay: boolean, shape of ``log_alpha``. Evaluation, statistics and pruning all ask here.

        Under a budget these are the gates with the largest ``log_alpha`` that fit into it. Else a gate stays if its
        median is positive; with the paper's estimate and β > 1, if that is positive too.
        """
        if self.rule is not None and torch.compiler.is_compiling():  # choosing them is no part of a graph
            chosen: Tensor = torch.ops.l0hooks.support(self.log_alpha.detach(), self._key)
            return chosen
        self._refresh()
        if self.rule is not None and self.mask is not None:
            return self.mask
        return self.stays_alone(whole(self.log_alpha.detach()))

    def train(self, mode: bool = True) -> Gate:
        """Switch modes; the rule catches up, because a compiled forward cannot ask it to."""
        if self.rule is not None and (self.rule.finished or not mode):
            self._refresh()
        super().train(mode)
        return self

    def _refresh(self) -> None:
        if self.rule is not None and not is_traced():
            self.rule.refresh()

    def kept(self) -> int:
        """How many gates stay; on the meta device, at the start."""
        if is_meta(self.log_alpha):
            return self.log_alpha.numel() * int(self.stays_alone(torch.tensor(self.start, device="cpu")))
        if self.rule is not None:
            return int(self.support().sum())
        return sum(int(self.stays_alone(location).sum()) for (location,) in pieces(whole(self.log_alpha.detach())))

    @torch.no_grad()
    def multiply(self, weight: Tensor, out: Tensor) -> Tensor:
        """``weight``, of the shape of ``log_alpha``, times the test-time gates, into ``out``; +0.0 for closed ones."""
        mask = None if self.rule is None else self.support()
        for w, location, stays, product in pieces(weight, whole(self.log_alpha), mask, out):
            z = self.value(location, support=stays).to(w.dtype)
            torch.mul(w, z, out=product).masked_fill_(z == 0, 0.0)
        return out

    def expected_l0(self) -> Tensor:
        """The expected number of gates that are not zero, differentiable, shape ()."""
        family = self.family
        if isinstance(family, HardConcreteFamily) and not is_traced():
            constants = Constants(self.temperature, family.gamma, family.zeta)
            sampler = None if is_sharded(self.log_alpha) else self.last_sample.node  # gathering wants a gradient
            return expected_count(whole(self.log_alpha), constants, sampler)
        return self.keep_prob().sum()

    @torch.no_grad()
    def project(self) -> None:
        """Bring ``log_alpha`` back into the limits. Runs by itself after every ``torch.optim`` step.

        Not once a rule has fixed the support.
        """
        if self.rule is None or not self.rule.finished:
            self.log_alpha.clamp_(*self.limits)

    def follow_schedule(self) -> None:
        """Go one step along the temperature's schedule. Runs by itself after every ``torch.optim`` step."""
        if self.schedule is not None and not (self.rule is not None and self.rule.finished):  # fixed values stay fixed
            self.temperature = self.schedule(self.scheduled_steps + 1)
            self.scheduled_steps += 1

    def extra_repr(self) -> str:
        """Shape, temperature and estimator."""
        return f"{tuple(self.log_alpha.shape)}, temperature={self.temperature:.4g}, estimator={self.estimator!r}"

    def end_forward(self) -> None:
        """No forward runs across an optimiser's step: one that was interrupted is over."""
        self.noise_source.source.interrupt()

    def get_extra_state(self) -> Tensor:
        """The temperature, its schedule's step and the rule's state, so that a checkpoint resumes with them."""
        return saved_state.state_of(self)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the temperature, its schedule's step and the rule's state; refuse those of another budget."""
        saved_state.resume(self, state, "Gate")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._key = register(self)  # a deepcopy is never constructed

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved_state.check_checkpoint(self, state_dict, prefix)
        self.mask = self.held = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def iter_gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Every gate below ``model``, wherever it lives, each once, with its qualified name.

    Parameters
    ----------
    model : nn.Module

    Yields
    ------
    (str, Gate)

    Examples
    --------
    >>> [name for name, _ in iter_gates(nn.ModuleDict({"samples": Gate(4)}))]
    ['samples']
    """
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            yield name, module


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Give every gate below ``model`` the temperature β.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    temperature : float, > 0

    Raises
    ------
    InvalidValueError
        If ``temperature`` is not positive; no gate is changed.

    Examples
    --------
    >>> gate = Gate(4)
    >>> set_temperature(gate, 0.5)
    >>> gate.temperature
    0.5
    """
    check_constants("set_temperature", temperature, GAMMA, ZETA)
    for _, gate in iter_gates(model):
        gate.temperature = temperature
