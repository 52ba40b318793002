"""Runs of a gated model and of its dense copy, for the inputs and outputs of single layers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.tensors import version
from l0hooks.training.batches import Forward, run
from l0hooks.training.criteria import as_scalar, slopes_of
from l0hooks.training.layer_inputs import input_rows, noting, output_rows
from l0hooks.training.normal_equations import NormalEquations

Rows = list[tuple[Tensor, Tensor | None]]  # of the calls in one batch: output rows, and how much each counts
Folds = tuple[NormalEquations, NormalEquations]
_MOST_KEPT = 2**28  # numbers of dense outputs to keep; those of later layers are computed again


class _ReachedError(Exception):
    """The layer that was looked at has been called as often as it will be."""


class LayerRuns:
    """Runs of a model and of its dense copy on calibration batches.

    Parameters
    ----------
    model, dense : nn.Module
        The gated model, and what it is to reproduce; both in evaluation mode.
    batches : sequence
    loss : callable, optional
        As for :func:`l0hooks.score`. Each row of a layer's outputs counts by the mean square of its gradient.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, batches: Sequence[Any], loss: Forward | None) -> None:
        self._model, self._dense = model, dense
        self._batches = batches
        self._loss = loss
        self._sizes: dict[str, int] = {}  # of the outputs of each layer that is still to come, in order
        self._kept: dict[str, list[Rows]] = {}

    def waves(self, names: Sequence[str]) -> list[dict[str, int]]:
        """The layers in the order of their first calls, and how often each is called for a batch.

        Layers that are called once, one after the other, with the same tensor share a run: solving for one does not
        change the inputs of the next.
        """
        calls: dict[str, list[tuple[Tensor, object]]] = {}
        numbers: dict[str, int] = {}

        def count(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
            calls.setdefault(name, []).append((x, version(x)))  # code may write into it between two calls
            numbers[name] = numbers.get(name, 0) + y.numel()

        with noting({name: self._dense.get_submodule(name) for name in names}, count):
            run(self._dense, self._batches[0], self._loss)
        self._sizes = {name: numbers[name] * len(self._batches) for name in calls}
        found: list[dict[str, int]] = []
        last: list[tuple[Tensor, object]] = []
        for name, inputs in calls.items():
            if len(last) == len(inputs) == 1 and last[0][0] is inputs[0][0] and last[0][1] == inputs[0][1]:
                found[-1][name] = 1
            else:
                found.append({name: len(inputs)})
            last = inputs
        return found

    def equations(self, wave: Mapping[str, int]) -> dict[str, Folds]:
        """The inputs of layers in the gated model, as they are now, and their outputs in the dense one.

        Those of every other batch apart; of the two halves of the only one.
        """
        found: dict[str, Folds] = {}
        for name in wave:
            constant = self._dense.get_submodule(name).bias is not None
            found[name] = NormalEquations(constant=constant), NormalEquations(constant=constant)
        self._keep_outputs(wave)
        outputs = {name: self._kept.pop(name) for name in wave}
        for number, batch in enumerate(self._batches):
            inputs = self._inputs(wave, batch)
            for name, folds in found.items():
                for x, (y, weights) in zip(inputs[name], outputs[name][number], strict=True):
                    self._add(folds, number, x, y, weights)
        return found

    def _keep_outputs(self, wave: Mapping[str, int]) -> None:
        """Run the dense model for the outputs of these layers, and of as many that follow as memory allows."""
        order = list(self._sizes)
        order = order[min(order.index(name) for name in wave) :]  # some may have been passed over
        if not self._kept.keys() >= wave.keys():
            chosen, room = list(wave), _MOST_KEPT - sum(self._sizes[name] for name in wave)
            for name in order[len(wave) :]:
                room -= self._sizes[name]
                if room < 0:
                    break
                chosen.append(name)
            self._kept = self._outputs(chosen)
        self._sizes = {name: self._sizes[name] for name in order[len(wave) :]}

    def _add(self, folds: Folds, number: int, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
        """Add the rows of one call to a fold."""
        if len(self._batches) > 1:
            folds[number % 2].add(x, y, weights)
            return
        half = (x.shape[1] + 1) // 2
        for fold, part in zip(folds, (slice(half), slice(half, None)), strict=True):
            fold.add(x[:, part], y[:, part], None if weights is None else weights[:, part])

    def _inputs(self, wave: Mapping[str, int], batch: Any) -> dict[str, list[Tensor]]:
        """The input rows of layers, from a run that ends with their last call."""
        found: dict[str, list[Tensor]] = {name: [] for name in wave}
        left = sum(wave.values())

        def note(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
            nonlocal left
            found[name].append(input_rows(module, x))
            left -= 1
            if not left:
                raise _ReachedError

        modules = {name: self._model.get_submodule(name) for name in wave}
        with noting(modules, note), contextlib.suppress(_ReachedError):
            run(self._model, batch, self._loss)
        return found

    def _outputs(self, names: Sequence[str]) -> dict[str, list[Rows]]:
        """The output rows of dense layers and their weights: for each layer a list of batches, each a list of calls."""
        modules = {name: self._dense.get_submodule(name) for name in names}
        found: dict[str, list[Rows]] = {name: [] for name in names}
        signs = torch.Generator().manual_seed(0)  # the same in every run over the batches
        for batch in self._batches:
            noted: list[tuple[str, Tensor]] = []

            def note(name: str, module: nn.Module, x: Tensor, y: Tensor, noted: Any = noted) -> Tensor | None:
                y = y if y.requires_grad or self._loss is None else y.detach().requires_grad_()
                noted.append((name, y))
                return None if self._loss is None else y.clone()  # what the model changes in place is the clone

            with noting(modules, note), torch.set_grad_enabled(self._loss is not None):
                value = run(self._dense, batch, self._loss)
                slopes: Sequence[Tensor | None] = [None] * len(noted)
                if self._loss is not None:
                    loss = as_scalar(value, signs)
                    slopes = slopes_of(loss, [y for _, y in noted], "recover")
            for rows in found.values():
                rows.append([])
            for (name, y), slope in zip(noted, slopes, strict=True):
                weights = None if slope is None else _row_weights(output_rows(modules[name], slope))
                found[name][-1].append((output_rows(modules[name], y.detach()), weights))
        return found


def _row_weights(slopes: Tensor) -> Tensor:
    """The mean square of each row's gradient, relative to the mean over all rows."""
    squares = slopes.float().square().mean(-1)
    return squares / squares.mean().clamp(min=torch.finfo(torch.float32).tiny)
