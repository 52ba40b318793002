"""``match_samples``: k samples that represent all of them."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from l0hooks.errors import InvalidValueError, UnsupportedModuleError, explain, near_names
from l0hooks.select.containers import Ints, check_counts, check_generator, is_pandas, values_of
from l0hooks.select.gates import SampleGate
from l0hooks.select.mean_distance import (
    Features,
    Kernel,
    Moments,
    Quadratic,
    distance,
    fourier_features,
    greedy,
    median_distance,
    swap,
)

Objective = Literal["kernel_mean", "moments"]
Loss = Callable[[Tensor], Tensor]
_MAX_KERNEL_SAMPLES = 5000  # with more samples random features replace the kernel matrix, which takes 200 MB
_DEFAULT_FEATURES = 1024
_GATED_SHARE = 0.8  # of the steps with a user's loss, after which exactly k gates are open
_CONSTANT_COLUMN = 1e-12  # a column is constant if its deviation is at most this share of its largest entry


@dataclass(frozen=True, kw_only=True)
class Match:
    """A subset and how close it is to all samples; prints as one line.

    Attributes
    ----------
    indices : int64, shape (k,)
        Ascending.
    k, n : int
        The size of the subset, and the number of samples.
    objective : str
        What was matched: "kernel_mean", "moments", or the name of the user's loss.
    distance : float
        The distance of the subset; with a user's loss, its value.
    random : float
        The mean distance of random subsets of the same size.
    draws : int
        The number of these random subsets.
    features : int or None
        The number of random Fourier features in place of the kernel; None if there were none.
    bandwidth : float or None
        Of the kernel, in standard deviations of the features.
    swaps : int
        The number of exchanges from the start to the subset.

    Examples
    --------
    >>> match = Match(indices=np.arange(2), k=2, n=9, objective="moments", distance=0.1, random=0.4, draws=20)
    >>> match.ratio
    0.25
    """

    indices: Ints
    k: int
    n: int
    objective: str
    distance: float
    random: float
    draws: int
    features: int | None = None
    bandwidth: float | None = None
    swaps: int = 0

    @property
    def ratio(self) -> float:
        """``distance / random``: 0 is perfect, 1 is no better than chance. NaN if random subsets are perfect."""
        return self.distance / self.random if self.random else math.nan

    def __str__(self) -> str:
        head = f"{self.k:,} of {self.n:,} samples by {self.objective}: distance {self.distance:.4g}"
        return f"{head}, {self.ratio:.3f} of a random subset's {self.random:.4g} (mean of {self.draws})"


def match_samples(
    x: Any,
    k: int,
    *,
    objective: Objective | Loss = "kernel_mean",
    sample_weight: Any = None,
    features: int | None = None,
    starts: int = 4,
    sweeps: int = 20,
    steps: int = 400,
    gate_lr: float = 0.1,
    draws: int = 20,
    generator: torch.Generator | None = None,
) -> Match:
    r"""Choose k samples that represent all: min over \|S\| = k of ‖(1/k) Σ_{i∈S} φ(xᵢ) − Σᵢ pᵢφ(xᵢ)‖.

    For the two built-in objectives every exchange of one sample for another has a closed form. The greedy choice and
    some random ones are improved by exchanges until none helps, and the best is returned.
    For your own loss a :class:`SampleGate` is trained.

    Parameters
    ----------
    x : Tensor, NumPy array or pandas DataFrame, shape (n, d)
        Finite numbers. For the built-in objectives every column is standardised, with ``sample_weight`` if given.
    k : int, 1 <= k <= n
        At most the number of samples with a weight above zero.
    objective : "kernel_mean", "moments" or callable
        "kernel_mean": φ of the Gaussian kernel exp(−‖x − y‖²/2σ²), where σ is the median distance between samples.
        "moments": φ(x) holds the columns and all products of two, so that means and covariances agree.
        A callable takes the gates of all samples (float32, shape (n,), in [0, 1]) and returns a loss, shape ().
        The sum of the gates varies: divide by ``z.sum()`` where that matters.
    sample_weight : Tensor, NumPy array or Series, shape (n,), >= 0, optional
        p is proportional to it. The chosen samples themselves count equally. Samples of weight zero are ignored and
        never chosen. Not allowed with a callable.
    features : int, >= 2, optional
        The number of random Fourier features in place of the kernel. By default the kernel itself is used for up to
        5000 samples, and 1024 features (8 kB for each sample) for more; the result says which.
    starts : int, >= 1
        The number of starts: the greedy choice and ``starts − 1`` random ones.
    sweeps : int, >= 0
        The largest number of passes through the chosen samples; each pass goes through the data k times.
    steps : int, >= 2
        Optimiser steps for a callable; k is reached after 80 % of them.
    gate_lr : float, > 0
        Adam's learning rate for a callable.
    draws : int, >= 1
        The number of random subsets to compare with, drawn with probabilities p without replacement.
    generator : torch.Generator, optional
        For random features, the samples that decide the bandwidth, and random subsets; by default torch's global
        generator, which gates always use.

    Returns
    -------
    Match

    Raises
    ------
    InvalidValueError
        If a value is out of range, data are not finite, or lengths do not fit.
    UnsupportedModuleError
        If ``x`` is of another kind. Sparse data are refused because they would have to be made dense.

    Examples
    --------
    >>> x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    >>> match = match_samples(x, 20, generator=torch.Generator().manual_seed(0))
    >>> len(match.indices), match.ratio < 0.3
    (20, True)

    References
    ----------
    Gretton et al. (2012), equation 3, for the distance; Rahimi & Recht (2007) for the features.
    """
    data = _numbers(x)
    total = len(data)
    p = _weights(sample_weight, total)
    weighted = p.nonzero().squeeze(1)
    if len(weighted) < total:
        data, p = data[weighted], p[weighted]
    n, k = check_counts("match_samples", len(data), k)
    count = _DEFAULT_FEATURES if features is None else features
    _check_least(starts=(starts, 1), sweeps=(sweeps, 0), steps=(steps, 2), draws=(draws, 1), features=(count, 2))
    check_generator("match_samples", generator)
    found: dict[str, Any]
    value_of: Callable[[Tensor], float]
    if callable(objective):
        if sample_weight is not None or features is not None:
            raise _invalid("your own loss takes neither sample_weight nor features.", "one of them", "None for both")
        rows = _by_gates(objective, n, k, steps, gate_lr)
        value_of = functools.partial(_value, objective, n=n)
        found = {"objective": objective.__name__ if inspect.isroutine(objective) else type(objective).__name__}
    else:
        form, found = _form(objective, data, p, features, generator)
        first = [greedy(form, k), *(_random(p, k, generator) for _ in range(starts - 1))]
        rows, found["swaps"] = min((swap(form, rows, sweeps) for rows in first), key=lambda one: distance(form, one[0]))
        value_of = functools.partial(distance, form)
        found["objective"] = objective
    indices = weighted[rows].sort().values
    random_values = [value_of(_random(p, k, generator)) for _ in range(draws)]
    return Match(
        indices=indices.numpy(),
        k=k,
        n=total,
        distance=value_of(rows),
        random=float(np.mean(random_values)),
        draws=draws,
        **found,
    )


def _check_least(**counts: tuple[int, int]) -> None:
    """Raise an error unless each value is an integer and at least the minimum that comes with it."""
    for name, (value, least) in counts.items():
        if type(value) is not int or value < least:
            raise _invalid(f"{name} must be large enough.", value, f"an integer >= {least}")


def _form(
    objective: str, data: Tensor, p: Tensor, features: int | None, generator: torch.Generator | None
) -> tuple[Quadratic, dict[str, Any]]:
    """The quadratic form of the objective, and the options used for it."""
    if objective not in get_args(Objective):
        raise _invalid("the objective must be known.", repr(objective), near_names(str(objective), get_args(Objective)))
    mean = p @ data
    spread = (p @ (data - mean).square()).sqrt()
    z = (data - mean) / torch.where(spread > _CONSTANT_COLUMN * data.abs().amax(0), spread, 1.0)
    if objective == "moments":
        if features is not None:
            raise _invalid('objective="moments" takes no random features.', features)
        return Moments(z, p), {}
    bandwidth = median_distance(z, generator)
    if features is None and len(z) <= _MAX_KERNEL_SAMPLES:
        return Kernel((torch.cdist(z, z).square() / (-2 * bandwidth**2)).exp(), p), {"bandwidth": bandwidth}
    count = _DEFAULT_FEATURES if features is None else features
    phi = fourier_features(z, count, bandwidth, generator)
    return Features(phi, p), {"bandwidth": bandwidth, "features": phi.shape[1]}


def _by_gates(loss: Loss, n: int, k: int, steps: int, gate_lr: float) -> Tensor:
    """The samples that gates choose after training on ``loss``."""
    gate = SampleGate(n, k, steps=max(1, int(_GATED_SHARE * steps)), init_keep_prob=0.5 if k < n else None)
    optimizer = torch.optim.Adam(gate.parameters(), lr=gate_lr)
    for _ in range(steps):
        if gate.rule.finished:
            break
        optimizer.zero_grad()
        loss(gate.gate()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return gate.chosen().nonzero().squeeze(1)


@torch.no_grad()
def _value(loss: Loss, rows: Tensor, n: int) -> float:
    return float(loss(torch.zeros(n).index_fill_(0, rows, 1.0)))


def _random(p: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """k rows drawn with probabilities p, without replacement."""
    arrival = torch.empty_like(p).exponential_(generator=generator) / p
    return arrival.argsort()[:k]


def _numbers(x: Any) -> Tensor:
    """``x`` as float64, shape (n, d)."""
    if is_pandas(x):
        x = values_of(x)
    if not isinstance(x, (Tensor, np.ndarray)):
        expected = "a Tensor, a NumPy array or a pandas DataFrame"
        raise UnsupportedModuleError(
            explain("match_samples", "the data must be dense.", expected=expected, got=type(x).__name__)
        )
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "biuf":
            raise _invalid("the data must be real numbers.", f"dtype {x.dtype}")
        x = torch.from_numpy(np.array(x, np.float64))
    if x.is_complex() or x.layout != torch.strided:
        raise _invalid("the data must be real and dense.", f"{x.dtype}, {x.layout}", "a dense tensor of real numbers")
    data: Tensor = x.detach().to("cpu", torch.float64).contiguous()
    if data.ndim != 2 or 0 in data.shape:
        raise _invalid("the data must have rows and columns.", tuple(data.shape), "shape (n, d), n and d >= 1")
    if not bool(data.isfinite().all()):
        raise _invalid("the data must be finite.", "NaN or infinity")
    return data


def _weights(given: Any, n: int) -> Tensor:
    """Weights that sum to 1."""
    if given is None:
        return torch.full((n,), 1 / n, dtype=torch.float64)
    w = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given, np.float64))
    w = w.detach().to("cpu", torch.float64)
    if w.shape != (n,):
        raise _invalid("each sample must have one weight.", tuple(w.shape), f"shape ({n},)")
    if not (bool(w.isfinite().all()) and bool((w >= 0).all()) and float(w.sum()) > 0):
        raise _invalid("weights must be finite, not negative and not all zero.", f"from {w.min():g} to {w.max():g}")
    return w / w.sum()


def _invalid(must: str, got: object, expected: str | None = None) -> InvalidValueError:
    return InvalidValueError(explain("match_samples", must, expected=expected, got=got))
