"""Least squares for the weights of a layer, some of which are zero: normal equations in float64 and their solution."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_ITERATIONS = 200  # of conjugate gradients
_ACCURACY = 1e-8  # what is left of the gradient at the start


class NormalEquations:
    """Σ x xᵀ, Σ y xᵀ and Σ |y|² over rows x of a layer's input and y of its output, for each group of channels.

    With a constant column at the end of x the bias is solved for, too.

    Parameters
    ----------
    constant : bool
        Whether the layer has a bias.

    Attributes
    ----------
    gram : Tensor, float64, shape (groups, features, features)
    cross : Tensor, float64, shape (groups, outputs, features)
    total : float
        Σ |y|².
    rows : int

    Examples
    --------
    >>> x = torch.randn(1, 50, 3)
    >>> equations = NormalEquations(constant=False)
    >>> equations.add(x, x @ torch.tensor([[1.0], [2.0], [3.0]]))
    >>> stays = torch.ones(1, 1, 3, dtype=torch.bool)
    >>> [round(w, 4) for w in solve(equations.gram, equations.cross, stays).flatten().tolist()]
    [1.0, 2.0, 3.0]
    """

    gram: Tensor
    cross: Tensor

    def __init__(self, *, constant: bool) -> None:
        self.constant = constant
        self.rows = 0
        self.total = 0.0

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Add rows of inputs, shape (groups, rows, features), and of outputs, shape (groups, rows, outputs).

        With ``weights``, shape (groups, rows), each row counts as often as its weight says.
        """
        x, y = x.detach().double(), y.detach().double()
        if self.constant:
            x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
        if weights is not None:
            roots = weights.double().sqrt()[..., None]
            x, y = x * roots, y * roots
        gram, cross = x.mT @ x, y.mT @ x
        if self.rows:
            self.gram += gram
            self.cross += cross
        else:
            self.gram, self.cross = gram, cross
        self.total += float(y.square().sum())
        self.rows += x.shape[1]

    def __add__(self, other: NormalEquations) -> NormalEquations:
        both = NormalEquations(constant=self.constant)
        both.gram, both.cross = self.gram + other.gram, self.cross + other.cross
        both.rows, both.total = self.rows + other.rows, self.total + other.total
        return both

    def fitted(self, prior: Tensor, stays: Tensor, share: float, *, accuracy: float = _ACCURACY) -> Tensor:
        """The weights that minimise Σ |y − W x|² + λ |W − prior|², zero outside ``stays``; λ from :meth:`ridge`."""
        penalty = self.ridge(share)
        cross = self.cross + prior * penalty[:, None, :]
        return solve(self.gram + torch.diag_embed(penalty), cross, stays, accuracy=accuracy)

    def error(self, weight: Tensor) -> float:
        """Σ |y − W x|² for weights of the shape of ``cross``."""
        fitted = ((weight @ self.gram - 2 * self.cross) * weight).sum()
        return max(self.total + float(fitted), 0.0)

    def ridge(self, share: float) -> Tensor:
        """What to add to the diagonal of ``gram``: ``share`` of its mean; nothing for the constant."""
        own = self.gram.shape[-1] - self.constant
        diagonal = self.gram.diagonal(dim1=-2, dim2=-1)
        mean = diagonal[:, :own].mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        found = (share * mean).expand(-1, diagonal.shape[-1]).clone()
        found[:, own:] = 0
        return found


def solve(gram: Tensor, cross: Tensor, stays: Tensor, *, accuracy: float = _ACCURACY) -> Tensor:
    """The minimum of ½·W·gram·Wᵀ − W·crossᵀ over weights that are zero outside ``stays``.

    Parameters
    ----------
    gram : Tensor, float64, shape (groups, features, features), positive definite on what stays
    cross : Tensor, float64, shape (groups, outputs, features)
    stays : Tensor, boolean, shape (groups, outputs, features)
    accuracy : float, > 0
        Of conjugate gradients: what is left of the gradient, as a share.

    Returns
    -------
    Tensor, float64, shape of ``cross``
    """
    return torch.stack([_solve_group(*one, accuracy) for one in zip(gram, cross, stays, strict=True)])


def _solve_group(gram: Tensor, cross: Tensor, stays: Tensor, accuracy: float) -> Tensor:
    found = torch.zeros_like(cross)
    patterns, which = torch.unique(stays, dim=0, return_inverse=True)
    if len(patterns) > 4:  # single weights: every output has its own
        return conjugate_gradients(gram, cross, stays, accuracy=accuracy)
    for number, pattern in enumerate(patterns):
        features, outputs = pattern.nonzero().flatten(), (which == number).nonzero().flatten()
        if len(features):
            factor = torch.linalg.cholesky(gram[features][:, features])
            right = cross[outputs][:, features].mT
            found[outputs[:, None], features] = torch.cholesky_solve(right, factor).mT
    return found


def conjugate_gradients(gram: Tensor, cross: Tensor, stays: Tensor, *, accuracy: float = _ACCURACY) -> Tensor:
    """:func:`solve` for one group where every output has other weights: all outputs at once, step by step.

    Each output has its own conjugate gradients (Hestenes & Stiefel, 1952), scaled by the diagonal of ``gram``, within
    its own weights.
    """
    scale = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
    weight = torch.zeros_like(cross)
    residual = torch.where(stays, cross, 0.0)
    scaled = residual / scale
    direction = scaled.clone()
    energy = (residual * scaled).sum(1, keepdim=True)
    enough = accuracy**2 * energy
    for _ in range(_MOST_ITERATIONS):
        image = torch.where(stays, direction @ gram, 0.0)
        curvature = (direction * image).sum(1, keepdim=True)
        going = (energy > enough) & (curvature > 0)
        if not bool(going.any()):
            break
        step = torch.where(going, energy / curvature, 0.0)
        weight += step * direction
        residual -= step * image
        scaled = residual / scale
        before, energy = energy, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(before > 0, energy / before, 0.0) * direction
    return weight
