"""Exchanges of members of a group: which of them, equally many, let a layer reproduce its outputs best."""

from __future__ import annotations

import torch
from torch import Tensor

_TRIED = 4  # closed members, the most promising first, before none is thought to be better
_LEAST_GAIN = 1e-4  # of the error at the start, for an exchange to be worth it

Members = Tensor  # int64, shape (members, width): the features of each


def exchange(gram: Tensor, cross: Tensor, stays: Tensor, members: Members, always: Tensor) -> Tensor:
    """Exchange open members of a group for closed ones as long as the least-squares error falls.

    An error is ½·W·gram·Wᵀ − W·crossᵀ at its minimum over the features of the open members. Every change is exact: the
    matrices are swept by the features of a member (Goodnight, 1979), so that its gain or loss can be read off them.

    Parameters
    ----------
    gram : Tensor, float64, shape (features, features), positive definite
    cross : Tensor, float64, shape (outputs, features)
    stays : Tensor, boolean, shape (members,)
    members : Tensor, int64, shape (members, width)
    always : Tensor, int64, shape (count,)
        Features that stay in any case. Those that belong to neither take no part.

    Returns
    -------
    Tensor, boolean, shape (members,)
        As many as in ``stays``.

    Examples
    --------
    >>> x = torch.randn(50, 3, dtype=torch.float64)
    >>> y = x[:, :1] + 0.1 * x[:, 1:2]
    >>> stays = torch.tensor([False, False, True])
    >>> exchange(x.T @ x, y.T @ x, stays, torch.arange(3)[:, None], torch.empty(0, dtype=torch.int64))
    tensor([ True, False, False])
    """
    if bool(stays.all()) or not bool(stays.any()):
        return stays
    stays, swept = stays.clone(), _Swept(gram, cross)
    swept.sweep(torch.cat([always, members[stays].flatten()]))
    least = _LEAST_GAIN * float(swept.gains(members[~stays]).sum())
    for _ in range(len(members)):
        opened, closed = stays.nonzero().flatten(), (~stays).nonzero().flatten()
        gains = swept.gains(members[closed])
        best, pair = least, None
        for candidate in gains.topk(min(_TRIED, len(closed))).indices.tolist():
            losses = swept.losses(members[opened], members[closed[candidate]])
            worst = int(losses.argmin())
            gain = float(gains[candidate] - losses[worst])
            if gain > best:
                best, pair = gain, (int(closed[candidate]), int(opened[worst]))
        if pair is None:
            break
        new, old = pair
        swept.sweep(members[new])
        swept.sweep(members[old], out=True)
        stays[new], stays[old] = True, False
    return stays


class _Swept:
    """gram and cross, swept by the features that are open: their inverse, the solution, and what is left to explain."""

    def __init__(self, gram: Tensor, cross: Tensor) -> None:
        self._gram = gram.clone()
        self._cross = cross.mT.contiguous()  # features first: members are rows

    def sweep(self, features: Tensor, *, out: bool = False) -> None:
        """Open features, or close them again."""
        rows = self._gram[features]
        inverse = torch.linalg.inv(rows[:, features])
        scaled, solution = inverse @ rows, inverse @ self._cross[features]
        self._cross.addmm_(rows.mT, solution, alpha=-1)
        self._gram.addmm_(rows.mT, scaled, alpha=-1)
        sign = -1.0 if out else 1.0
        self._gram[features] = sign * scaled
        self._gram[:, features] = sign * scaled.mT
        self._gram[features[:, None], features] = -inverse
        self._cross[features] = sign * solution

    def gains(self, closed: Members) -> Tensor:
        """By how much the error falls when each of the closed members is opened."""
        return _quadratic(self._blocks(closed), self._cross[closed])

    def losses(self, opened: Members, new: Tensor) -> Tensor:
        """By how much the error rises when each open member is closed, after the features ``new`` are opened."""
        rows = self._gram[new]
        scaled = torch.linalg.solve(rows[:, new], rows[:, opened.flatten()])  # (new, features of opened)
        slopes = self._cross[opened] - (scaled.mT @ self._cross[new]).view(*opened.shape, -1)
        columns = rows.mT[opened]  # (members, width, new)
        changes = columns @ scaled.view(len(new), *opened.shape).permute(1, 0, 2)
        return _quadratic(changes - self._blocks(opened), slopes)

    def _blocks(self, members: Members) -> Tensor:
        return self._gram[members[:, :, None], members[:, None, :]]


def _quadratic(blocks: Tensor, slopes: Tensor) -> Tensor:
    """½·tr(sᵀ B⁻¹ s) for blocks B, shape (members, width, width), and s, shape (members, width, outputs)."""
    if blocks.shape[-1] == 1:
        squares: Tensor = slopes.square().sum((1, 2))
        return squares / (2 * blocks.flatten())
    found: Tensor = (slopes * torch.linalg.solve(blocks, slopes)).sum((1, 2)) / 2
    return found
