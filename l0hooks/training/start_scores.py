"""How far apart the gates of a budget start: by the weights behind them, or by scores from data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from l0hooks.attach.walk import Gated
from l0hooks.errors import InvalidValueError, SpecError, explain
from l0hooks.gates.gate import iter_gates
from l0hooks.training.budget import Budget
from l0hooks.training.by_gate import sum_by_gate
from l0hooks.training.size import Size

_MOST_DEVIATIONS = 3.0  # many weights are close to 0, and their logarithms far away


def start_scores(
    part: Sequence[Gated], budget: Budget, size: Size, given: Mapping[int, Tensor] | None
) -> list[Tensor | None]:
    """What each array of gates is raised by at the start of its budget; None for an array that is not.

    Parameters
    ----------
    part : sequence of Gated
        The gates of the budget.
    budget : Budget
    size : Size
    given : mapping from the id of a gate to Tensor, optional
        From :func:`check_scores`.
    """
    if not budget.prior:
        return [None] * len(part)
    found = by_weights(part) if given is None else by_scores(part, size, given)
    most = _MOST_DEVIATIONS if budget.steps else torch.inf  # in one shot the order is all that counts
    return [None if one is None else budget.prior * one.clamp(-most, most) for one in found]


@torch.no_grad()
def by_scores(part: Sequence[Gated], size: Size, given: Mapping[int, Tensor]) -> list[Tensor | None]:
    """The logarithm of score / what one gate's removal saves, in standard deviations from the mean of all gates."""
    saved = size.gradient(size.counts.astype(float))
    logs: list[Tensor | None] = []
    for one, each in zip(part, saved, strict=True):
        value = given.get(id(one.gate))
        logs.append(None if value is None else (value.to(one.gate.log_alpha) / max(float(each), 1e-12)).log())
    known = [log[log.isfinite()].double().cpu() for log in logs if log is not None]
    together = torch.cat(known) if known else torch.zeros(0)
    if not together.numel():
        return [None] * len(part)
    middle, spread = float(together.mean()), max(float(together.std(correction=0)), 1e-6)
    return [None if log is None else (log - middle) / spread for log in logs]


@torch.no_grad()
def by_weights(part: Sequence[Gated]) -> list[Tensor | None]:
    """How much the weights behind the gates of each array speak for them; None for an array without weights.

    The logarithm of the root mean square of the weights behind a gate, in standard deviations from the mean: that of
    all single weights together, or of the array's own gates where these are channels, kernels or blocks.
    """
    sizes = [_log_size(one) for one in part]
    single = [s for s, one in zip(sizes, part, strict=True) if s is not None and _is_single(one)]
    together = torch.cat([s.flatten().to(single[0].device) for s in single]) if single else None
    scores: list[Tensor | None] = []
    for size, one in zip(sizes, part, strict=True):
        known = together if _is_single(one) else size
        if size is None or known is None or not bool(known.isfinite().any()):
            scores.append(None)
            continue
        finite = known[known.isfinite()]
        spread = finite.std(correction=0).clamp(min=1e-6).to(size.device)
        scores.append((size - finite.mean().to(size.device)) / spread)
    return scores


def check_scores(model: nn.Module, free: Sequence[Gated], scores: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Scores by the id of their gate, once it is sure that they fit the gates of ``model``.

    Raises
    ------
    SpecError
        If a gate that multiplies weights has none, or one of another shape.
    InvalidValueError
        If scores are negative or not finite.
    """
    names = {id(gate): name for name, gate in iter_gates(model)}
    found = {}
    for one in free:
        name, shape = names[id(one.gate)], tuple(one.gate.log_alpha.shape)
        value = scores.get(name)
        if value is None and not one.sites:
            continue
        if value is None or tuple(value.shape) != shape:
            got = "none" if value is None else f"shape {tuple(value.shape)}"
            text = explain(
                f"set_budget: the gate {name!r}",
                "scores must be those of this model's gates.",
                expected=f"shape {shape}",
                got=got,
                hint="scores=l0hooks.score(model, batches) of the model with these gates",
            )
            raise SpecError(text)
        if not bool((value.isfinite() & (value >= 0)).all()):
            got = f"{float(value.min()):.3g} to {float(value.max()):.3g}"
            raise InvalidValueError(
                explain(f"set_budget: the gate {name!r}", "scores must be finite and not negative.", got=got)
            )
        found[id(one.gate)] = value
    return found


def _is_single(one: Gated) -> bool:
    return bool(one.sites) and one.sites[0].gating.granularity == "weight"


def _log_size(one: Gated) -> Tensor | None:
    """log of the root mean square of the weights behind each gate; None without weights."""
    if not one.sites:
        return None
    squares, counts = torch.zeros_like(one.gate.log_alpha), torch.zeros_like(one.gate.log_alpha)
    for site in one.weights():
        squares += sum_by_gate(site, one.gate, site.weight.detach().square())
        counts += sum_by_gate(site, one.gate, torch.ones_like(site.weight))
    return (squares / counts.clamp(min=1)).log() / 2
