"""``recover``: weights of layers that read closed channels, in closed form."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from l0hooks._torch.running import evaluating
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.attach.plain import plain_copy
from l0hooks.attach.walk import Gated, iter_gated
from l0hooks.errors import InvalidValueError, L0HooksWarning, StateError, explain
from l0hooks.gates.registry import rules_over
from l0hooks.training.batches import Forward, check_batches
from l0hooks.training.by_gate import check_data
from l0hooks.training.layer_runs import LayerRuns
from l0hooks.training.recovery import SHARES, exchangeable, layers_of, recover_layer

_LEAST_ROWS = 2  # for each open input of a layer


@dataclass(frozen=True)
class RecoveredLayer:
    """What :func:`recover` did to one layer.

    Attributes
    ----------
    name : str
    before, after : float
        Σ |y − ŷ|² of the dense outputs y and those of the gated layer, as a share of Σ |y|²; after: on every other
        batch by weights that were fitted to the rest.
    exchanged : int
        Members of a group that were opened in place of others.

    Examples
    --------
    >>> print(RecoveredLayer("fc", 0.25, 0.125, 2))
    fc: error 0.2500 to 0.1250, 2 members exchanged
    """

    name: str
    before: float
    after: float
    exchanged: int

    def __str__(self) -> str:
        more = f", {self.exchanged} members exchanged" if self.exchanged else ""
        return f"{self.name}: error {self.before:.4f} to {self.after:.4f}{more}"


@dataclass(frozen=True)
class Recovery:
    """What :func:`recover` did; prints as one line for each layer.

    Attributes
    ----------
    layers : tuple of RecoveredLayer
        In the order in which they run.
    skipped : mapping from str to str
        Weights with closed gates that stay as they are, and why.

    Examples
    --------
    >>> print(Recovery((RecoveredLayer("fc", 0.25, 0.125, 0),), {"attention.out_proj.weight": "a weight of Linear"}))
    fc: error 0.2500 to 0.1250
    as it was: attention.out_proj.weight (a weight of Linear)
    """

    layers: tuple[RecoveredLayer, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        left = [f"as it was: {name} ({reason})" for name, reason in self.skipped.items()]
        return "\n".join([*map(str, self.layers), *left])


def recover(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Forward | None = None,
    dense: nn.Module | None = None,
    ridge: float | None = None,
    exchange: bool = True,
    downstream: bool = True,
) -> Recovery:
    """Let layers reproduce their dense outputs from what closed gates have left of their inputs, **in place**.

    For every Linear and Conv layer that reads closed channels or comes after one that does, in the order in which they
    run, the weights W on its open inputs x (and its bias) minimise Σ |y − W x|² + λ |W − W₀|² over the batches: y are
    the layer's outputs in the dense model, x its inputs in the gated one, in which the layers before it have been
    recovered already, and W₀ its weights so far. Weights with closed gates do not change. Nothing is trained, and
    ``prune`` stays exact.

    Parameters
    ----------
    model : nn.Module
        With gates, some of them closed.
    batches : iterable
        Each a tensor, a tuple of positional arguments or a mapping of keyword arguments of ``model``. They should hold
        several times as many examples (or tokens, or positions) as the widest layer has inputs.
    loss : callable (model, batch) -> Tensor, optional
        As for :func:`l0hooks.score`: a scalar, or numbers to be preserved. Each row y counts by the mean square of its
        gradient, so that rows that matter more (and no padding) are reproduced better. Without it all rows count alike.
    dense : nn.Module, optional
        What to reproduce: a model with the same modules. By default the model with all gates open, as its weights are
        now.
    ridge : float, > 0, optional
        λ as a share of the mean of Σ x² over the inputs. By default each layer's is the one of several with the least
        error on batches that the weights were not fitted to; a layer that none makes better stays as it is.
    exchange : bool
        First exchange open members of a group that one layer reads alone for closed ones, as long as that lowers the
        error, there too on batches that were not used. Their ``log_alpha`` change places; the size stays what it is.
    downstream : bool
        Also solve for layers without closed gates whose inputs are no longer what they were, because they come after
        the first layer with some.

    Returns
    -------
    Recovery

    Raises
    ------
    StateError
        If no layer reads closed channels, residual width is gated, or weights have no data or are spread over
        processes.
    InvalidValueError
        If ``ridge`` is not positive.
    SpecError
        If there are no batches.

    Warns
    -----
    L0HooksWarning
        If the schedule of a budget has not ended, so that other gates may stay in the end; if a layer has more than
        half as many inputs as the batches hold rows.

    Examples
    --------
    >>> import torch
    >>> from l0hooks import Budget, sparsify
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> x = torch.randn(256, 8)
    >>> _ = sparsify(model, "coupled", example_inputs=(x,), budget=Budget(sparsity=0.5, unit="params", steps=0))
    >>> (layer,) = recover(model, x.split(64)).layers
    >>> layer.name, layer.after < layer.before
    ('2', True)

    References
    ----------
    He, Zhang & Sun (2017), Channel pruning for accelerating very deep neural networks, equation 1; Frantar & Alistarh
    (2022), Optimal brain compression; Meng, Behdin, Wang & Mazumder (2024), OSSCAR, for exchanges.
    """
    if ridge is not None and not ridge > 0:
        raise InvalidValueError(explain("recover", "ridge must be positive.", expected="> 0", got=ridge))
    found = check_batches("recover", batches)
    check_data("recover", iter_sites(model))
    every = list(iter_gated(model))
    _refuse_width(every)
    layers, skipped = layers_of(model, every)
    closing = {name for name, layer in layers.items() if layer.reads_closed}
    if not closing:
        got = "gates that are all open" if every else "no gates"
        got = f"closed gates on {', '.join(skipped)} alone" if skipped else got
        raise StateError(
            explain(
                "recover",
                "a Linear or Conv layer must have closed gates.",
                got=got,
                hint="train the budget to its end, finish_budget(model), or Budget(..., steps=0)",
            )
        )
    _warn_unfinished(every)
    by_gate = {id(one.gate): one for one in every}
    reference = _in_own_memory(plain_copy(model) if dense is None else dense, model)
    done: list[RecoveredLayer] = []
    few: dict[str, tuple[int, int]] = {}
    with evaluating(model), evaluating(reference):
        runs = LayerRuns(model, reference, found, loss)
        waves = runs.waves(list(layers) if downstream else [name for name in layers if name in closing])
        called = {name for wave in waves for name in wave}
        skipped |= {f"{name}.weight": "not called on the first batch" for name in closing - called}
        shares = SHARES if ridge is None else (ridge,)
        for wave in waves:
            if not done and closing.isdisjoint(wave):
                continue  # nothing before it has changed
            for name, folds in runs.equations(wave).items():
                layer = layers[name]
                few |= {name: (sum(fold.rows for fold in folds), layer.inputs)}
                groups = exchangeable(layer, by_gate) if exchange and name in closing else ()
                done.append(RecoveredLayer(name, *recover_layer(layer, folds, shares, groups)))
    _warn_if_few({name: counts for name, counts in few.items() if counts[0] < _LEAST_ROWS * counts[1]})
    return Recovery(tuple(done), skipped)


def _in_own_memory(dense: nn.Module, model: nn.Module) -> nn.Module:
    """``dense``, or a copy of it if it shares memory with ``model``, whose weights are about to change."""
    memory = {parameter.data_ptr() for parameter in model.parameters()}
    return copy.deepcopy(dense) if any(p.data_ptr() in memory for p in dense.parameters()) else dense


def _refuse_width(every: Iterable[Gated]) -> None:
    """The dense outputs of layers that write a narrower stream are not what they are to reproduce."""
    stream = next((one for one in every if one.coupled is not None and one.coupled.group.width is not None), None)
    if stream is not None:
        raise StateError(
            explain(
                "recover",
                "layers must have kept all their outputs.",
                got=f'gates of kind "width" on {stream.name!r}, which close outputs of many layers',
                hint="train the gated model instead, or recover before the width is gated",
            )
        )


def _warn_if_few(layers: Mapping[str, tuple[int, int]]) -> None:
    """Warn of layers with more open inputs than the batches hold rows for."""
    if layers:
        name, (rows, inputs) = max(layers.items(), key=lambda one: one[1][1] / max(one[1][0], 1))
        text = explain(
            f"recover: {name!r}" + (f" and {len(layers) - 1} more layers" if len(layers) > 1 else ""),
            "the batches should hold several times as many rows (examples, tokens, positions) as a layer has inputs.",
            expected=f"at least {_LEAST_ROWS * inputs:,} rows",
            got=f"{rows:,}",
            hint="more batches",
        )
        warnings.warn(text, L0HooksWarning, stacklevel=3)


def _warn_unfinished(every: Iterable[Gated]) -> None:
    for rule in rules_over(one.gate for one in every):
        progress = rule.progress()
        if progress.step < progress.steps:
            text = explain(
                "recover",
                "the support should be final: other gates may stay in the end.",
                expected=f"step {progress.steps:,}",
                got=f"step {progress.step:,}",
                hint="finish_budget(model) first",
            )
            warnings.warn(text, L0HooksWarning, stacklevel=3)
