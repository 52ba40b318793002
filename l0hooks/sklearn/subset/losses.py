"""Losses of generalised linear models, and their exact fit on a few columns by Newton steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit, logsumexp, softmax, xlogy

from l0hooks.sklearn.subset.design import Floats

MIN_RIDGE = 1e-9  # on standardised coefficients: gives separable data an optimum and hardly changes other fits
REFERENCE_CURVATURE = 0.1  # for smaller null curvatures (rare classes, small counts) both minima shrink
MAX_NEWTON_STEPS = 100
MAX_HALVINGS = 40
DECREMENT_TOLERANCE = 1e-10  # a fit ends when the expected fall of a Newton step is below this share of the loss
MIN_CURVATURE = 1e-10  # smaller curvatures are raised to this


class Loss(Protocol):
    """A loss of the linear predictor η of each row."""

    @property
    def constraints(self) -> int:
        """The number of outputs that the others determine."""

    def value(self, eta: Floats, y: Floats) -> Floats:
        """The loss of each row, shape (n,), from η and y of shape (n, c)."""

    def mean(self, eta: Floats) -> Floats:
        """The expected y, shape (n, c)."""

    def curvature(self, eta: Floats) -> Floats:
        """The second derivative, averaged over the directions of the outputs, shape (n,)."""

    def hessian(self, eta: Floats) -> Floats:
        """∂²/∂η∂η, shape (n, c, c)."""

    def start(self, mean: Floats) -> Floats:
        """The intercepts that fit a mean y, shape (c,)."""


class Logistic:
    """log(1 + e^η) − yη for y in {0, 1}.

    Examples
    --------
    >>> Logistic().value(np.array([[0.0]]), np.array([[1.0]])).round(4).tolist()
    [0.6931]
    """

    constraints = 0

    def value(self, eta: Floats, y: Floats) -> Floats:
        return np.asarray((np.logaddexp(0, eta) - y * eta)[:, 0])

    def mean(self, eta: Floats) -> Floats:
        return np.asarray(expit(eta))

    def curvature(self, eta: Floats) -> Floats:
        return np.asarray((expit(eta) * expit(-eta))[:, 0])

    def hessian(self, eta: Floats) -> Floats:
        return self.curvature(eta)[:, None, None]

    def start(self, mean: Floats) -> Floats:
        inside = np.clip(mean, MIN_CURVATURE, 1 - MIN_CURVATURE)
        return np.asarray(np.log(inside / (1 - inside)))


class Multinomial:
    """log Σ e^ηc − yᵀη for y one of c unit vectors.

    Examples
    --------
    >>> Multinomial().mean(np.zeros((1, 4))).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """

    constraints = 1

    def value(self, eta: Floats, y: Floats) -> Floats:
        return np.asarray(logsumexp(eta, axis=1) - (y * eta).sum(1))

    def mean(self, eta: Floats) -> Floats:
        return np.asarray(softmax(eta, axis=1))

    def curvature(self, eta: Floats) -> Floats:
        p = self.mean(eta)
        return np.asarray((p * (1 - p)).sum(1) / (p.shape[1] - 1))

    def hessian(self, eta: Floats) -> Floats:
        p = self.mean(eta)
        return np.asarray(p[:, :, None] * (np.eye(p.shape[1]) - p[:, None, :]))

    def start(self, mean: Floats) -> Floats:
        logs = np.log(np.maximum(mean, MIN_CURVATURE))
        return np.asarray(logs - logs.mean())


class Poisson:
    """Half the deviance: e^η − yη + y log y − y for counts y.

    Examples
    --------
    >>> Poisson().value(np.array([[np.log(2.0)]]), np.array([[2.0]])).round(12).tolist()
    [0.0]
    """

    constraints = 0

    def value(self, eta: Floats, y: Floats) -> Floats:
        with np.errstate(over="ignore"):  # a step that is too long has an infinite loss and is halved
            return np.asarray((np.exp(eta) - y * eta + xlogy(y, y) - y)[:, 0])

    def mean(self, eta: Floats) -> Floats:
        return np.asarray(np.exp(eta))

    def curvature(self, eta: Floats) -> Floats:
        return np.asarray(np.exp(eta)[:, 0])

    def hessian(self, eta: Floats) -> Floats:
        return self.curvature(eta)[:, None, None]

    def start(self, mean: Floats) -> Floats:
        return np.asarray(np.log(np.where(mean > 0, mean, MIN_CURVATURE)))


@dataclass(frozen=True)
class Fit:
    """A fit on some columns.

    Attributes
    ----------
    b : float64 array, shape (s, c)
        Coefficients.
    offset : float64 array, shape (c,)
        Intercepts.
    eta : float64 array, shape (n, c)
        The linear predictor.
    loss : float
        The mean loss with the ridge term.
    steps : int
        The number of Newton steps.
    """

    b: Floats
    offset: Floats
    eta: Floats
    loss: float
    steps: int


class NewtonFit:
    """Newton steps with halving for one loss and one response.

    Parameters
    ----------
    loss : Loss
    y : float64 array, shape (n, c)
    weight : float64 array, shape (n,)
        Summing to 1.
    intercept : bool
    """

    def __init__(self, loss: Loss, y: Floats, weight: Floats, *, intercept: bool) -> None:
        self.loss, self.y, self.weight, self.intercept = loss, y, weight, intercept
        self.c = y.shape[1]
        mean = weight @ y
        start = loss.start(mean)
        self.offset = start if intercept else np.zeros(self.c)
        self.unit = min(1.0, float(loss.curvature(start[None])[0]) / REFERENCE_CURVATURE)

    def null(self) -> Fit:
        """The fit of the intercept alone."""
        eta = np.tile(self.offset, (len(self.y), 1))
        return Fit(np.zeros((0, self.c)), self.offset, eta, float(self.weight @ self.loss.value(eta, self.y)), 0)

    def fit(self, z: Floats, ridge: Floats, start: tuple[Floats, Floats] | None = None) -> Fit:
        """The fit on the columns of ``z``.

        Parameters
        ----------
        z : float64 array, shape (n, s)
            Standardised columns.
        ridge : float64 array, shape (s,)
            For each column; at least ``MIN_RIDGE · unit`` is used.
        start : (b, offset), optional
        """
        full = np.column_stack([np.ones(len(z)), z]) if self.intercept else z
        penalty = np.maximum(ridge, MIN_RIDGE * self.unit)
        penalty = np.concatenate([[0.0], penalty]) if self.intercept else penalty
        b, offset = (np.zeros((z.shape[1], self.c)), self.offset) if start is None else start
        theta = np.vstack([offset, b]) if self.intercept else b
        eta = full @ theta
        value = self._objective(eta, theta, penalty)
        steps = 0
        for _ in range(MAX_NEWTON_STEPS):
            steps += 1
            step, decrement = self._step(full, eta, theta, penalty)
            size, along = 1.0, full @ step
            trial = self._objective(eta - along, theta - step, penalty)
            # close to the optimum, rounding would decide whether the step is accepted: take it untested
            last = decrement <= DECREMENT_TOLERANCE * max(value, DECREMENT_TOLERANCE * self.unit)
            for _ in range(0 if last else MAX_HALVINGS):
                if trial <= value - 1e-4 * size * decrement:
                    break
                size /= 2
                trial = self._objective(eta - size * along, theta - size * step, penalty)
            if not (last or trial < value):
                break
            theta, value = theta - size * step, trial
            eta = full @ theta
            if last:
                break
        if self.loss.constraints:  # adding a constant to all outputs changes nothing: make their mean zero
            theta = theta - theta.mean(1, keepdims=True)
            eta = full @ theta
        offset = theta[0] if self.intercept else np.zeros(self.c)
        return Fit(theta[1:] if self.intercept else theta, offset, eta, value, steps)

    def _objective(self, eta: Floats, theta: Floats, penalty: Floats) -> float:
        return float(self.weight @ self.loss.value(eta, self.y)) + float(penalty @ (theta**2).sum(1)) / 2

    def _step(self, full: Floats, eta: Floats, theta: Floats, penalty: Floats) -> tuple[Floats, float]:
        gradient = full.T @ (self.weight[:, None] * (self.loss.mean(eta) - self.y)) + penalty[:, None] * theta
        blocks = self.loss.hessian(eta) * self.weight[:, None, None]
        size = full.shape[1]
        hessian = np.empty((self.c, size, self.c, size))
        for i in range(self.c):
            for j in range(i + 1):
                hessian[i, :, j] = full.T @ (blocks[:, i, j, None] * full)
                hessian[j, :, i] = hessian[i, :, j].T
        flat = hessian.reshape(self.c * size, -1)  # rows by output, then by column; einops costs 2 % of a fit here
        # intercepts and a constant added to all outputs may have no curvature
        flat[np.diag_indices_from(flat)] += np.tile(penalty, self.c) + MIN_CURVATURE * self.unit
        step = cho_solve(cho_factor(flat), gradient.T.ravel()).reshape(self.c, size).T
        return step, float((gradient * step).sum())
