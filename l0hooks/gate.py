"""``Gate``: learnable log-odds, their noise, and the one rule that says which gates stay."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from l0hooks.errors import InvalidValueError, explain, near_names
from l0hooks.families import Family, FamilyName, HardConcreteFamily, initial_log_alpha, make_family
from l0hooks.fused import is_traced, sampled
from l0hooks.hard_concrete import GAMMA, ZETA, check_constants
from l0hooks.noise import Door, NoiseSource

Estimator = Literal["median", "paper", "mean"]


class Rule(Protocol):
    """What decides for several gates together which of them stay; a budget.

    Attributes
    ----------
    step : int
        Optimiser steps so far.
    finished : bool
        Whether the support is fixed: gates no longer move, and training uses their final values.
    """

    step: int

    @property
    def finished(self) -> bool: ...

    @property
    def first(self) -> Gate:
        """The gate whose optimiser counts."""
        ...

    def refresh(self) -> tuple[object, ...]:
        """Bring ``mask`` and ``held`` of every gate up to date; a key that tells one state from another."""
        ...

    def before_step(self) -> None:
        """The optimiser is about to use the gradients."""
        ...

    def after_step(self) -> None:
        """The optimiser has moved the gates."""
        ...


class Gate(nn.Module):
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
    door : Door, optional
        Where the noise comes from; a source of its own if not given.
    index : int
        The gate's number at that source.

    Attributes
    ----------
    rule : Rule or None
        Who decides which gates stay; None for the gate alone.

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

    log_alpha: nn.Parameter

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
        door: Door | None = None,
        index: int = 0,
    ) -> None:
        super().__init__()
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(n < 1 for n in size):
            raise InvalidValueError(explain("Gate", "every axis must be positive.", expected=">= 1", got=size))
        self.family: Family = make_family(family, gamma, zeta)
        self.temperature = self.family.default_temperature if temperature is None else temperature
        start = initial_log_alpha(self.family, init_mean, init_keep_prob, self.temperature)
        low, high = self.family.limits
        self.limits = (min(low, start), max(high, start))
        self.estimator = check_estimator_name(estimator)
        self.log_alpha = nn.Parameter(torch.full(size, start, dtype=torch.float32, device=device))
        self._door = NoiseSource().add_door("", ()) if door is None else door
        self._index = index
        self.rule: Rule | None = None
        self.mask: Tensor | None = None  # the rule's: which gates stay, and, once they are fixed, their values
        self.held: Tensor | None = None
        self._enter()

    @property
    def temperature(self) -> float:
        """β, the scale of the noise."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_constants("temperature", value, GAMMA, ZETA)
        self._temperature = float(value)

    def forward(self) -> Tensor:
        """The gates: a sample in training, the test-time gates in evaluation; float32, shape of ``log_alpha``."""
        return self.sample() if self.training else self.value()

    def noise(self, examples: int | None = None) -> Tensor:
        """Uniform noise of the running forward, shape of ``log_alpha``; every caller gets memory of its own.

        With ``examples``, a first axis of that length: independent noise for each.
        """
        like = self.log_alpha if examples is None else self.log_alpha.new_empty((examples, *self.log_alpha.shape))
        return self._door.uniform(self._index, like)

    def sample(self, examples: int | None = None) -> Tensor:
        """Gates with the noise of the running forward, differentiable; for each example if ``examples`` is given.

        Once a rule has fixed the support they are its final values, without noise and with a gradient of zero.
        """
        if self.rule is not None and self.rule.finished:
            held = self.final() + 0 * self.log_alpha  # distributed training wants to see every parameter used
            return held if examples is None else held.expand(examples, *held.shape)
        family, noise = self.family, self.noise(examples)
        if type(family) is HardConcreteFamily and not is_traced():
            return sampled(self.log_alpha, noise, self.temperature, family.gamma, family.zeta)
        return family.sample(self.log_alpha, noise, self.temperature)

    def value(self, log_alpha: Tensor | None = None) -> Tensor:
        """The test-time gates, differentiable, exactly zero outside :meth:`support`.

        ``log_alpha`` may be given to stand for the gate's own, with equal values.
        """
        estimate: Callable[[Tensor, float], Tensor] = {
            "median": self.family.median,
            "paper": self.family.paper,
            "mean": self.family.mean,
        }[self.estimator]
        z = estimate(whole(self.log_alpha) if log_alpha is None else log_alpha, self.temperature)
        return torch.where(self.support(), z if self.rule is None else z.clamp(min=self.family.least_open), 0.0)

    def final(self) -> Tensor:
        """The values that a rule has fixed: float32, shape of ``log_alpha``, constant."""
        if self.rule is None or torch.compiler.is_compiling():
            return self.value().detach()
        self.rule.refresh()
        return self.value().detach() if self.held is None else self.held

    def support(self) -> Tensor:
        """Which gates stay: boolean, shape of ``log_alpha``. Evaluation, statistics and pruning all ask here.

        Under a budget these are the gates with the largest ``log_alpha`` that fit into it. Else a gate stays if its
        median is positive; with the paper's estimate and β > 1, if that is positive too.
        """
        if self.rule is not None and torch.compiler.is_compiling():  # choosing them is no part of a graph
            chosen: Tensor = torch.ops.l0hooks.support(self.log_alpha.detach(), self._key)
            return chosen
        if self.rule is not None:
            self.rule.refresh()
            if self.mask is not None:
                return self.mask
        log_alpha = whole(self.log_alpha.detach())
        stays = self.family.median(log_alpha, self.temperature) > 0
        if self.estimator == "paper":
            stays &= self.family.paper(log_alpha, self.temperature) > 0
        return stays

    def keep_prob(self) -> Tensor:
        """P(z ≠ 0) of every gate, differentiable."""
        return self.family.keep_prob(whole(self.log_alpha), self.temperature)

    def expected_l0(self) -> Tensor:
        """The expected number of gates that are not zero, differentiable, shape ()."""
        return self.keep_prob().sum()

    @torch.no_grad()
    def project(self) -> None:
        """Bring ``log_alpha`` back into the limits. Runs by itself after every ``torch.optim`` step."""
        self.log_alpha.clamp_(*self.limits)

    def extra_repr(self) -> str:
        """Shape, temperature and estimator."""
        return f"{tuple(self.log_alpha.shape)}, temperature={self.temperature:.4g}, estimator={self.estimator!r}"

    def get_extra_state(self) -> Tensor:
        """The temperature and the rule's step, so that a checkpoint resumes with them."""
        return torch.tensor([self.temperature, 0 if self.rule is None else self.rule.step], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the temperature and the rule's step."""
        temperature, step = state.tolist()
        self.temperature = temperature
        if self.rule is not None:
            self.rule.step = int(step)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._enter()  # a deepcopy is never constructed

    def _enter(self) -> None:
        self._key = next(_keys)
        _live[self._key] = self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.mask = self.held = None
        if self.log_alpha.dtype != torch.float32:  # load_state_dict(assign=True) takes the checkpoint's dtype
            self.log_alpha = nn.Parameter(self.log_alpha.float(), requires_grad=self.log_alpha.requires_grad)


_live: weakref.WeakValueDictionary[int, Gate] = weakref.WeakValueDictionary()
_keys = itertools.count()


@torch.library.custom_op("l0hooks::support", mutates_args=())
def _support_op(log_alpha: Tensor, key: int) -> Tensor:
    return _live[key].support().clone()


@_support_op.register_fake
def _(log_alpha: Tensor, key: int) -> Tensor:
    return torch.empty_like(log_alpha, dtype=torch.bool)


_steps = 0


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, or all of one that ``fully_shard`` has spread over processes; a collective call then."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)  # importing DTensor takes a second
    return tensor if gather is None else gather()


def steps_taken() -> int:
    """How many steps all optimisers of this process have taken: fused ones change tensors without a new version."""
    return _steps


def gate_ids() -> set[int]:
    """The ids of the log-odds of every gate there is."""
    return {id(gate.log_alpha) for gate in _live.values()}


def _moved(optimizer: torch.optim.Optimizer) -> list[Gate]:
    """The gates that ``optimizer`` moves."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [gate for gate in _live.values() if id(gate.log_alpha) in own]


def _rules(gates: Sequence[Gate]) -> list[Rule]:
    """The rules that count the steps of one of ``gates``."""
    return [gate.rule for gate in gates if gate.rule is not None and gate.rule.first is gate]


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    rules = _rules(_moved(optimizer))
    closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None or not rules:
        for rule in rules:
            rule.before_step()
        return None

    def then_rules() -> object:  # the gradients come only now; Lightning passes every step as a closure
        loss = closure()
        for rule in rules:
            rule.before_step()
        return loss

    return (args[0], then_rules, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}


def _after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    global _steps
    _steps += 1
    moved = _moved(optimizer)
    for gate in moved:
        gate.project()
    for rule in _rules(moved):
        rule.after_step()
    for gate in _live.values():
        gate._door.source.owner = None  # no forward runs across a step: one that was interrupted is over


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


def check_estimator_name(name: Estimator) -> Estimator:
    """``name``, if it is one of the test-time gates.

    Raises
    ------
    InvalidValueError
        If it is not.
    """
    if name not in get_args(Estimator):
        raise InvalidValueError(
            explain(
                "estimator",
                "the test-time gate must be known.",
                got=repr(name),
                hint=near_names(str(name), get_args(Estimator)),
            )
        )
    return name


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
