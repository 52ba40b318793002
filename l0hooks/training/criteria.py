"""What closing a gate would cost, estimated in several ways: one number for each gate of a plain model's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from l0hooks.attach.walk import Gated
from l0hooks.errors import InvalidValueError, SpecError, StateError, explain, in_one_line
from l0hooks.training.batches import Forward, floats_of, run
from l0hooks.training.by_gate import sum_by_gate
from l0hooks.training.layer_inputs import as_matrix, as_weight, has_rows, input_rows, noting, output_rows

Criterion = Literal["taylor", "wanda", "activation", "magnitude"]


def taylor(plain: nn.Module, scored: Sequence[Gated], batches: Sequence[Any], loss: Forward | None) -> list[Tensor]:
    """½·mean over batches of (∂loss/∂z)² at z = 1: the increase of the loss to second order, with Fisher's matrix.

    ∂loss/∂z is the sum of weight · gradient over all weights that the gate multiplies. Without a loss, or where it
    returns several numbers, these are to be preserved: the loss is their product with random signs, whose mean square
    is the squared change of all of them.
    """
    sites = {site.name: site for one in scored for site in one.weights()}
    weights = {name: plain.get_parameter(name).requires_grad_() for name in sites}
    totals = [torch.zeros_like(one.gate.log_alpha) for one in scored]
    signs = torch.Generator().manual_seed(0)
    for number, batch in enumerate(batches):
        with torch.enable_grad():
            value = as_scalar(run(plain, batch, loss), signs)
            found = slopes_of(value, list(weights.values()), "score")
        products = {
            name: None if grad is None else grad.detach().float() * weight.detach().float()
            for (name, weight), grad in zip(weights.items(), found, strict=True)
        }
        for one, total in zip(scored, totals, strict=True):
            slope = torch.zeros_like(total)
            for site in one.weights():
                product = products[site.name]
                if product is not None:
                    slope += sum_by_gate(site, one.gate, product)
            total += slope.square() / 2
        _refuse_not_finite(number, totals)
    return [total / len(batches) for total in totals]


def magnitude(plain: nn.Module, scored: Sequence[Gated], *_: Any) -> list[Tensor]:
    """Σ weight² over the weights that the gate multiplies."""
    return _summed(plain, scored, lambda site, weight: weight.square())


def wanda(plain: nn.Module, scored: Sequence[Gated], batches: Sequence[Any], loss: Forward | None) -> list[Tensor]:
    """Σ weight²·mean of (its input)²: how much the layers' outputs change (Sun, Liu, Bair & Kolter, 2024, eq. 1)."""
    squares = _mean_squares("wanda", plain, scored, batches, loss, outputs=False)
    return _summed(plain, scored, lambda site, weight: weight.square() * squares[site.name])


def activation(plain: nn.Module, scored: Sequence[Gated], batches: Sequence[Any], loss: Forward | None) -> list[Tensor]:
    """Mean over a gate's weights of the mean square of what they read; of what they write for gates on outputs."""
    inputs = [one for one in scored if one.sites[0].gating.granularity != "output"]
    outputs = [one for one in scored if one.sites[0].gating.granularity == "output"]
    squares = _mean_squares("activation", plain, inputs, batches, loss, outputs=False) if inputs else {}
    squares |= _mean_squares("activation", plain, outputs, batches, loss, outputs=True) if outputs else {}
    sums = _summed(plain, scored, lambda site, weight: squares[site.name])
    counts = _summed(plain, scored, lambda site, weight: torch.ones_like(weight))
    return [total / count.clamp(min=1) for total, count in zip(sums, counts, strict=True)]


Estimate = Callable[[nn.Module, Sequence[Gated], Sequence[Any], Forward | None], list[Tensor]]
CRITERIA: dict[Criterion, Estimate] = {
    "taylor": taylor,
    "wanda": wanda,
    "activation": activation,
    "magnitude": magnitude,
}


def as_scalar(value: Any, signs: torch.Generator) -> Tensor:
    """A loss as it is; several numbers times random signs."""
    if isinstance(value, Tensor) and not value.dim():
        return value
    terms = []
    for leaf in floats_of(value):
        sign = torch.randint(0, 2, leaf.shape, generator=signs, dtype=torch.int8).to(leaf.device)
        terms.append((leaf.float() * (2 * sign - 1)).sum())
    if not terms:
        raise SpecError(
            explain(
                "score",
                "the loss, or the model's output, must hold floating-point numbers.",
                got=type(value).__name__,
                hint="loss=lambda model, batch: ... that returns a scalar",
            )
        )
    return torch.stack(terms).sum()


def slopes_of(value: Tensor, tensors: Sequence[Tensor], where: str) -> Sequence[Tensor | None]:
    """∂value/∂tensor for each of ``tensors``; None for those that it does not depend on.

    Raises
    ------
    StateError
        If ``value`` depends on none, or the model's code cannot be differentiated.
    """
    try:
        return torch.autograd.grad(value, tensors, allow_unused=True)
    except RuntimeError as error:
        text = explain(
            where,
            "the loss must have a gradient.",
            got=in_one_line(error),
            hint="a loss computed without torch.no_grad(), by code that changes no tensor in place that gradients need",
        )
        raise StateError(text) from error


def _refuse_not_finite(number: int, totals: Sequence[Tensor]) -> None:
    if not all(bool(total.isfinite().all()) for total in totals):
        raise InvalidValueError(
            explain(
                f"score: batch {number}",
                "gradients must be finite.",
                got="infinity or NaN",
                hint="a loss of smaller size, or the model in float32",
            )
        )


def _summed(plain: nn.Module, scored: Sequence[Gated], term: Any) -> list[Tensor]:
    """Σ of ``term(site, weight)`` over the weights behind each gate."""
    return [
        torch.stack(
            [
                sum_by_gate(site, one.gate, term(site, plain.get_parameter(site.name).detach().float()))
                for site in one.weights()
            ]
        ).sum(0)
        for one in scored
    ]


def _mean_squares(
    criterion: str,
    plain: nn.Module,
    scored: Sequence[Gated],
    batches: Sequence[Any],
    loss: Forward | None,
    *,
    outputs: bool,
) -> dict[str, Tensor]:
    """The mean square of what each weight is multiplied with (or writes), laid over the weight."""
    sites = {site.name: site for one in scored for site in one.weights()}
    modules = {name: plain.get_submodule(site.module_name) for name, site in sites.items()}
    _refuse_without_rows(criterion, {name: m for name, m in modules.items() if sites[name].weight.dim() > 1})
    vectors = [name for name in modules if sites[name].weight.dim() < 2]
    if vectors:
        raise _without_inputs(criterion, vectors[0], "a bias, which has no input")
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(sites, 0)

    def note(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        rows = output_rows(module, y) if outputs else input_rows(module, x)
        squares = rows.detach().float().square().sum(1)
        sums[name] = sums[name] + squares if name in sums else squares
        counts[name] += rows.shape[1]

    with noting(modules, note), torch.no_grad():
        for batch in batches:
            run(plain, batch, loss)
    found = {}
    for name in sites:
        weight = plain.get_parameter(name)
        matrix = as_matrix(modules[name], weight)
        mean = sums[name] / counts[name] if name in sums else weight.new_zeros(matrix.shape[0], 1)
        laid = mean[:, :, None] if outputs and name in sums else mean[:, None, :]
        found[name] = as_weight(modules[name], laid.expand(matrix.shape), weight.shape)
    return found


def _refuse_without_rows(criterion: str, modules: dict[str, nn.Module]) -> None:
    wrong = [name for name, module in modules.items() if not has_rows(module)]
    if wrong:
        raise _without_inputs(criterion, wrong[0], f"a weight of {type(modules[wrong[0]]).__name__}")


def _without_inputs(criterion: str, name: str, got: str) -> SpecError:
    return SpecError(
        explain(
            f"score: {name!r}",
            f"{criterion!r} looks at the inputs of Linear and Conv layers.",
            got=got,
            hint='criterion="taylor"',
        )
    )
