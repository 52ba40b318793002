r"""The gate stage: Hard Concrete gates over the units, trained at an exact, scheduled expected size.

Every epoch draws gates z, forms x = e^θ·z and p = Bx, and descends on ½ Σ dist(s·p, [l, u])² in θ and in the gates'
log-odds, s the best common factor. Units whose gate is exactly zero contribute nothing to p, and neither θ nor their
log-odds have a gradient: both products run over the open ones only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l0hooks.calibration.fit.gate_descent import GateDescent, NumberedNoise
from l0hooks.calibration.fit.saved import Fields
from l0hooks.calibration.fit.stage import Progress, Selection, State, largest
from l0hooks.calibration.numerics.columns import Floats, Integers
from l0hooks.calibration.numerics.least_squares import bounded_fit
from l0hooks.calibration.numerics.problem import Problem
from l0hooks.gates.constants import GAMMA, ZETA
from l0hooks.gates.gate import Gate
from l0hooks.schedules import Schedule, exponential
from l0hooks.training._set_budget import set_budget
from l0hooks.training.budget import Budget
from l0hooks.training.penalties import penalty

_START_FACTOR, _MOST_AT_START = 4.0, 0.9  # expected size at the start: four times the final one, at most 0.9 of all
_SHRINKING_SHARE = 0.6  # of the epochs, until the final size is reached
_FULL_RATE_SHARE = 0.6  # of the epochs, until the learning rates fall
_LARGEST_SCORE = 5.0  # log-odds at the start, against those of the last unit wanted
_EPOCHS_PER_STATE = 10  # the state can be saved after every tenth epoch
_THETA_RATE, _GATE_RATE, _SCALE_RATE = 0.05, 0.3, 0.2  # learning rates of θ, the log-odds and the common factor


class GateStage:
    """Trains the gates of a problem.

    Parameters
    ----------
    problem : Problem
    keep : int, optional
        The expected number of units that stay, those that must included; held exactly, on schedule. Either this or
        ``l0``.
    l0 : float, > 0, optional
        The price of one unit in the loss Σ dist², as in the earlier library, through the penalty registry.
    epochs : int, > 0
    start : float64, > 0, shape (n,), optional
        g to start from; by :func:`warm_start` if not given.
    log_odds : float32, shape (n,), optional
        Log-odds to start from, instead of those by the contributions of ``start``.
    random_state : int, >= 0
    copied_share : float, >= 0
        If a smaller share of the units is open, their columns are copied first, which makes the products faster.

    Examples
    --------
    >>> from scipy import sparse
    >>> from l0hooks.calibration.numerics.preparation import prepare
    >>> rng = np.random.default_rng(0)
    >>> matrix = sparse.csr_array(rng.random((4, 50)))
    >>> stage = GateStage(prepare(matrix, matrix @ np.ones(50)), keep=8, epochs=20)
    >>> while not stage.done:
    ...     progress = stage.advance()
    >>> progress.step, len(stage.selection().units)
    (20, 8)

    References
    ----------
    Louizos, Welling & Kingma (2018), section 2.2.
    """

    def __init__(
        self,
        problem: Problem,
        keep: int | None = None,
        *,
        l0: float | None = None,
        epochs: int = 200,
        start: Floats | None = None,
        log_odds: Floats | None = None,
        random_state: int = 0,
        copied_share: float = 0.6,
    ) -> None:
        self.problem, self.keep, self.l0, self.epochs = problem, keep, l0, epochs
        self.epoch, self._copied_share = 0, copied_share
        self._free = np.flatnonzero(~problem.kept)
        self._all_free = len(self._free) == problem.size
        # the place of each unit among the free ones
        self._place = np.where(problem.kept, -1, np.cumsum(~problem.kept) - 1) if not self._all_free else self._free
        wanted = len(self._free) / 2 if keep is None else keep - (problem.size - len(self._free))
        first = min(_START_FACTOR * wanted, _MOST_AT_START * len(self._free))
        self._noise = NumberedNoise(random_state)
        self.gate = Gate(len(self._free), init_keep_prob=max(first, wanted) / len(self._free))
        self.gate.noise_source = self._noise
        begin = warm_start(problem) if start is None else start
        scores = _scores(problem, begin, self._free, wanted) if log_odds is None else log_odds[self._free]
        self._set_budget(int(wanted), torch.from_numpy(scores).float())
        least = 1e-3 * float(np.median(begin[begin > 0])) if (begin > 0).any() else 1.0
        self.theta = torch.nn.Parameter(torch.from_numpy(np.log(np.maximum(begin, least))).float())
        self._adam = torch.optim.Adam([self.theta], lr=_THETA_RATE, betas=(0.9, 0.99), eps=1e-10, fused=True)
        self._descent = GateDescent([self.gate.log_alpha], lr=_GATE_RATE)

    def _set_budget(self, wanted: int, scores: Tensor) -> None:
        if self.l0 is not None:
            with torch.no_grad():
                self.gate.log_alpha.add_(scores)
            return
        (self._rule,) = set_budget(self.gate, Budget(keep=wanted, steps=self.epochs, schedule=_shrinking, min_keep=0))
        self._rule.start_from([scores])

    @property
    def done(self) -> bool:
        """Whether all epochs are over."""
        return self.epoch >= self.epochs

    @property
    def settled(self) -> bool:
        """Whether the expected size is the final one, so that errors of epochs can be compared."""
        return self.epoch >= max(_SHRINKING_SHARE, _FULL_RATE_SHARE) * self.epochs

    @property
    def resumable(self) -> bool:
        """Whether :meth:`state` may be called now: after every tenth epoch."""
        return self.epoch % _EPOCHS_PER_STATE == 0

    def advance(self) -> Progress:
        """One epoch."""
        self._noise.epoch = self.epoch
        with torch.no_grad():
            opened = self.gate.sample().numpy()
        z = opened if self._all_free else self._with_kept(opened)
        active = np.flatnonzero(z)
        strength = np.exp(self.theta.detach().numpy()[active])
        x = z[active] * strength
        slope, misses, factor = self._slope(active, x)
        self.theta.grad = self._spread(active, slope * x, self.problem.size)
        by_gate = slope * strength * self._opening(z[active])
        if self._all_free:
            self.gate.log_alpha.grad = self._spread(active, by_gate, self.problem.size)
        else:
            free = self._place[active] >= 0
            places = self._place[active][free]
            self.gate.log_alpha.grad = self._spread(places, by_gate[free], len(self._free))
        if self.l0 is not None:
            (self.l0 / 2 * penalty(self.gate, l0=1.0)).backward()  # type: ignore[no-untyped-call]
        self._step(factor)
        return Progress("gates", self.epoch, self.epochs, self.problem.error(misses), len(active))

    def _with_kept(self, opened: Any) -> Any:
        z = np.ones(self.problem.size, np.float32)
        z[self._free] = opened
        return z

    def _opening(self, z: Any) -> Any:
        """dz / d log-odds of gates, from their values: zero where they are clamped, and once they are fixed."""
        if self.l0 is None and self._rule.finished:
            return np.zeros_like(z)
        share = (z - GAMMA) / (ZETA - GAMMA)
        return np.where(z < 1, (ZETA - GAMMA) / self.gate.temperature * share * (1 - share), 0)

    @staticmethod
    def _spread(places: Integers, values: Any, count: int) -> Tensor:
        whole = np.zeros(count, np.float32)
        whole[places] = values
        return torch.from_numpy(whole)

    def _slope(self, active: Integers, x: Any) -> tuple[Any, Floats, float]:
        """d loss / dx of the active units (float32), the misses, and the common factor."""
        problem, columns = self.problem, self.problem.columns
        if len(active) < self._copied_share * problem.size:
            block, part = columns[active], x
        else:
            block, part = columns, np.zeros(problem.size, np.float32)
            part[active] = x
        p = np.asarray(block.T @ part.astype(block.dtype), np.float64)
        towards = np.clip(p, problem.lower, problem.upper)
        square = float(p @ p)
        factor = min(max(float(towards @ p) / square, 1e-6), 1e6) if square > 0 else 1.0
        misses = problem.misses(factor * p)
        slope = (block @ (factor * misses).astype(block.dtype)).astype(np.float32)
        return slope if block is not columns else slope[active], misses, factor

    def _step(self, factor: float) -> None:
        done = self.epoch / self.epochs
        decay = (
            1.0
            if done < _FULL_RATE_SHARE
            else (1 + math.cos(math.pi * (done - _FULL_RATE_SHARE) / (1 - _FULL_RATE_SHARE))) / 2
        )
        self._adam.param_groups[0]["lr"] = _THETA_RATE * decay
        self._adam.step()
        self._descent.step()
        self.gate.log_alpha.grad = None
        with torch.no_grad():
            self.theta.add_(_SCALE_RATE * math.log(factor))
        self.epoch += 1

    def log_odds(self) -> Floats:
        """The log-odds of all units, infinite for those that must stay: float64, shape (n,)."""
        ranked = np.full(self.problem.size, np.inf)
        ranked[self._free] = self.gate.log_alpha.detach().numpy()
        return ranked

    def values(self) -> Floats:
        """e^θ of all units: float64, shape (n,)."""
        return self.theta.detach().double().exp().numpy()

    def selection(self) -> Selection:
        """The ``keep`` units with the largest log-odds; with a price, those whose gates are open."""
        if self.keep is not None:
            return self.leading(self.keep)
        chosen = self.problem.kept.copy()
        chosen[self._free] = self.gate.support().numpy()
        units = np.flatnonzero(chosen)
        return Selection(units, self.values()[units])

    def leading(self, count: int) -> Selection:
        """The ``count`` units with the largest log-odds."""
        units = largest(self.log_odds(), count)
        return Selection(units, self.values()[units])

    def state(self) -> State:
        """What :meth:`resume` needs."""
        adam, descent = self._adam.state[self.theta], self._descent.state[self.gate.log_alpha]
        return {
            "epoch": self.epoch,
            "theta": self.theta.detach().numpy().copy(),
            "log_alpha": self.gate.log_alpha.detach().numpy().copy(),
            "rule": np.array(() if self.l0 is not None else self._rule.state()),
            "means": np.stack([s.numpy() for s in (adam["exp_avg"], adam["exp_avg_sq"])]) if adam else np.zeros(0),
            "momentum": descent["mean"].numpy().copy() if descent else np.zeros(0),
            "square": descent["square"] if descent else 0.0,
        }

    @torch.no_grad()
    def resume(self, state: State) -> None:
        """Go on from ``state``, of a stage made with the same arguments."""
        saved = Fields(state, "gates", "epoch", "theta", "log_alpha", "rule", "means", "momentum", "square")
        epoch, size, free = saved.whole("epoch", most=self.epochs), self.problem.size, len(self._free)
        theta, log_alpha = saved.array("theta", (size,), np.float32), saved.array("log_alpha", (free,), np.float32)
        rule = saved.array("rule", (0,) if self.l0 is not None else (3,)).tolist()
        means = saved.array("means", (2, size), np.float32) if epoch else ()
        momentum: Any = saved.array("momentum", (free,), np.float32) if epoch else ()
        squares = saved.number("square", least=0)
        saved.check("rule", not rule or rule[0] == epoch, f"steps of {epoch} epochs")
        if self.l0 is None:
            self._rule.resume(*rule)
        self.epoch = epoch
        self.theta.copy_(torch.from_numpy(theta))
        self.gate.log_alpha.copy_(torch.from_numpy(log_alpha))
        if self.epoch:
            mean, square = (torch.from_numpy(part.copy()) for part in means)
            steps = torch.tensor(float(self.epoch))
            self._adam.state[self.theta] = {"step": steps, "exp_avg": mean, "exp_avg_sq": square}
            self._descent.state[self.gate.log_alpha] = {
                "steps": self.epoch,
                "square": squares,
                "mean": torch.from_numpy(momentum.copy()),
            }


def warm_start(problem: Problem, iterations: int = 60) -> Floats:
    """g of a short non-negative least-squares fit of all units: float64, shape (n,)."""
    target = np.clip((problem.lower + problem.upper) / 2, problem.lower, problem.upper)
    target = np.where(np.isfinite(target), target, np.clip(0.0, problem.lower, problem.upper))
    zeros, high = np.zeros(problem.size), np.full(problem.size, np.inf)
    fit = bounded_fit(problem.columns, target, zeros, high, np.ones(problem.size), iterations=iterations)
    return fit.g


def _scores(problem: Problem, g: Floats, free: Integers, wanted: float) -> Floats:
    """Log-odds at the start: the logarithm of each contribution over that of the last unit wanted, within limits."""
    contribution = (g * problem.norms)[free]
    last = max(0, len(free) - max(1, int(wanted)))
    edge = np.partition(contribution, last)[last]
    reference = max(float(edge), 1e-12 * float(contribution.max(initial=0.0)), 1e-300)
    scores: Floats = np.clip(np.log(contribution / reference + 1e-6), -_LARGEST_SCORE, _LARGEST_SCORE)
    return scores


def _shrinking(start: float, stop: float, steps: int) -> Schedule:
    return exponential(start, stop, max(1, round(_SHRINKING_SHARE * steps)))
