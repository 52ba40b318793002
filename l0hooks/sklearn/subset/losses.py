"""Losses of generalised linear models, and their exact fit on a few columns by Newton steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit, logsumexp, softmax, xlogy

from l0hooks.sklearn.subset.design import Floats

FLOOR = 1e-9  # ridge on standardised coefficients: an optimum exists for separable data too, and moves no other
USUAL = 0.1  # null curvature below which the floors fall with it, for rare classes and small counts
NEWTON_STEPS = 100
HALVINGS = 40
DECREMENT = 1e-10  # a Newton step that promises less than this part of the loss ends the fit
LIGHTEST = 1e-10  # curvatures below this count as this


class Loss(Protocol):
    """A loss of the linear predictor η, row by row."""

    @property
    def constraints(self) -> int:
        """Outputs that the others determine."""

    def value(self, eta: Floats, y: Floats) -> Floats:
        """The loss of each row, shape (n,), for η and y of shape (n, c)."""

    def mean(self, eta: Floats) -> Floats:
        """The expected y, shape (n, c)."""

    def curvature(self, eta: Floats) -> Floats:
        """The mean second derivative over the outputs' directions, shape (n,)."""

    def hessian(self, eta: Floats) -> Floats:
        """∂²/∂η∂η, shape (n, c, c)."""

    def start(self, mean: Floats) -> Floats:
        """The intercepts that fit the mean y, shape (c,)."""


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
        inside = np.clip(mean, LIGHTEST, 1 - LIGHTEST)
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
        logs = np.log(np.maximum(mean, LIGHTEST))
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
        with np.errstate(over="ignore"):  # a step too far costs infinity, and is halved
            return np.asarray((np.exp(eta) - y * eta + xlogy(y, y) - y)[:, 0])

    def mean(self, eta: Floats) -> Floats:
        return np.asarray(np.exp(eta))

    def curvature(self, eta: Floats) -> Floats:
        return np.asarray(np.exp(eta)[:, 0])

    def hessian(self, eta: Floats) -> Floats:
        return self.curvature(eta)[:, None, None]

    def start(self, mean: Floats) -> Floats:
        return np.asarray(np.log(np.where(mean > 0, mean, LIGHTEST)))


@dataclass(frozen=True)
class Fit:
    """A fit on some columns: coefficients, intercepts, linear predictor, mean loss with the ridge, Newton steps."""

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
        self.unit = min(1.0, float(loss.curvature(start[None])[0]) / USUAL)

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
            For each column; no less than ``FLOOR``, times ``unit`` where the null curvature is small, is used.
        start : (b, offset), optional
        """
        full = np.column_stack([np.ones(len(z)), z]) if self.intercept else z
        penalty = np.maximum(ridge, FLOOR * self.unit)
        penalty = np.concatenate([[0.0], penalty]) if self.intercept else penalty
        b, offset = (np.zeros((z.shape[1], self.c)), self.offset) if start is None else start
        theta = np.vstack([offset, b]) if self.intercept else b
        eta = full @ theta
        value = self._objective(eta, theta, penalty)
        steps = 0
        for _ in range(NEWTON_STEPS):
            steps += 1
            step, decrement = self._step(full, eta, theta, penalty)
            size, along = 1.0, full @ step
            trial = self._objective(eta - along, theta - step, penalty)
            # so near that rounding would judge the step
            last = decrement <= DECREMENT * max(value, DECREMENT * self.unit)
            for _ in range(0 if last else HALVINGS):
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
        if self.loss.constraints:  # what all outputs share does not matter: none is left
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
        flat = hessian.reshape(self.c * size, -1)
        # intercepts, and what the outputs share, have no curvature of their own
        flat[np.diag_indices_from(flat)] += np.tile(penalty, self.c) + LIGHTEST * self.unit
        step = cho_solve(cho_factor(flat), gradient.T.ravel()).reshape(self.c, size).T
        return step, float((gradient * step).sum())
