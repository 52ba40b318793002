"""A model's size as a function of how many gates stay: in gates, parameters, bytes or multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.nn.parameter import UninitializedParameter

from l0hooks._torch.modules import tensors_of
from l0hooks._torch.tensors import distinct
from l0hooks.attach.gated_weight import Site
from l0hooks.attach.measured_size import Unit
from l0hooks.attach.walk import Gated
from l0hooks.errors import SpecError, explain
from l0hooks.structure.example_inputs import ExampleInputs
from l0hooks.structure.group_costs import CoupledPlan
from l0hooks.structure.macs import count_positions, total_macs

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Positions = Mapping[tuple[int, str], float]


@dataclass(frozen=True)
class Size:
    """constant + linear·k + k·square·k for k gates that stay in each array of gates; ``square`` is symmetric.

    Attributes
    ----------
    counts : int64, shape (arrays,)
        How many gates each array has.
    constant : float
        What no gate can remove.
    linear : float64, shape (arrays,)
    square : float64, shape (arrays, arrays)
    floor : int64, shape (arrays,)
        How many gates of each array always stay: one of a coupled group, which cannot be cut to nothing.
    sets : tuple of tuples of int, or None
        Arrays that keep equally many gates, by their numbers; each array is in one set.
    multiple : int64, shape (arrays,)
        What the number of gates that stay in each array is a multiple of, where it has as many.

    Examples
    --------
    >>> size = Size(np.array([4, 2]), constant=3.0, linear=np.array([1.0, 10.0]), square=np.zeros((2, 2)))
    >>> size.whole, size.of(np.array([2.0, 1.0]))
    (27.0, 15.0)
    """

    counts: npt.NDArray[np.int64]
    constant: float
    linear: Floats
    square: Floats
    floor: npt.NDArray[np.int64] | int = 0
    sets: tuple[tuple[int, ...], ...] | None = None
    multiple: npt.NDArray[np.int64] | int = 1

    @property
    def whole(self) -> float:
        """The size with every gate open."""
        return self.of(self.counts.astype(np.float64))

    def least(self, min_keep: int) -> Floats:
        """How many gates of each array stay at the least."""
        wanted = np.minimum(np.maximum(min_keep, self.floor), self.counts)
        widths = self.widths
        least: Floats = np.minimum(-(-wanted // widths), self.counts // widths).astype(np.float64) * widths
        return least

    @property
    def widths(self) -> npt.NDArray[np.int64]:
        """How many gates of each array stay or go together."""
        return np.minimum(self.multiple, self.counts)

    def of(self, kept: Floats, variance: Floats | None = None) -> float:
        """The size when ``kept`` gates stay; with expected numbers and their variances, the expected size."""
        spread = 0.0 if variance is None else float(np.diagonal(self.square) @ variance)
        return float(self.constant + self.linear @ kept + kept @ self.square @ kept) + spread

    def gradient(self, kept: Floats) -> Floats:
        """What one gate more or less of each array changes."""
        gradient: Floats = self.linear + 2 * self.square @ kept
        return gradient


def fitting(size: Size, array_of: Ints, allowed: float) -> npt.NDArray[np.bool_]:
    """Which gates fit into a size: the longest run from the front, then whatever still fits, in order.

    Parameters
    ----------
    size : Size
    array_of : int64, shape (gates,)
        The array that each gate belongs to, the gates in order of preference.
    allowed : float

    Returns
    -------
    bool, shape (gates,)
    """
    arrays = len(size.counts)

    def counts(length: int) -> Floats:
        return np.bincount(array_of[:length], minlength=arrays).astype(np.float64)

    low, high = 0, len(array_of)
    while low < high:  # the size grows with every gate
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size.of(counts(middle)) <= allowed else (low, middle - 1)
    fits = np.arange(len(array_of)) < low
    kept = counts(low)
    rest = [low + np.flatnonzero(array_of[low:] == array) for array in range(arrays)]
    place = np.zeros(arrays, np.int64)
    while True:
        more = size.gradient(kept) + np.diagonal(size.square)
        left = allowed - size.of(kept)
        next_ = [r[n] if n < len(r) and c <= left else len(fits) for r, n, c in zip(rest, place, more, strict=True)]
        best = int(np.argmin(next_))
        if next_[best] == len(fits):
            return fits
        others = min([*next_[:best], *next_[best + 1 :], len(fits)])
        run = rest[best][place[best] : place[best] + np.searchsorted(rest[best][place[best] :], others)]
        if size.square[best, best]:
            run = run[:1]
        elif more[best]:
            run = run[: int(left / more[best] * (1 + 1e-12))]
        fits[run] = True
        kept[best] += len(run)
        place[best] += len(run)


def size_of(
    model: nn.Module,
    gated: Sequence[Gated],
    every: Sequence[Gated],
    unit: Unit,
    example_inputs: ExampleInputs | None,
    *,
    whole: bool,
) -> Size:
    """The size of ``model`` in ``unit``, by the numbers of gates that stay in the arrays of ``gated``.

    Parameters
    ----------
    model : nn.Module
    gated : sequence of Gated
        Arrays of gates that may vary.
    every : sequence of Gated
        All of the model.
    unit : "gates", "params", "macs" or "memory"
    example_inputs : sequence or None
        Positional arguments of ``model``, for multiply-adds.
    whole : bool
        Count what has no gates, too; else only the tensors that ``gated`` removes from.

    Raises
    ------
    SpecError
        If multiply-adds are asked for without example inputs, bytes of gates that are on no coupled group, or a tensor
        that counts also belongs to other gates.
    """
    counts = np.array([one.gate.log_alpha.numel() for one in gated], np.int64)
    zeros = np.zeros((len(gated), len(gated)))
    if unit == "gates":
        return Size(counts, 0.0, np.ones(len(gated)), zeros)
    standalone = next((one.name for one in gated if not one.sites), None)
    if standalone is not None:
        raise SpecError(
            explain(f"budget over {standalone!r}", "a standalone gate has no parameters.", hint='unit="gates"')
        )
    single = next((one.name for one in gated if one.coupled is None), None) if unit == "memory" else None
    if single is not None:
        raise SpecError(
            explain(
                'Budget(unit="memory")',
                "bytes are saved where members of coupled groups are cut; the zeros of other gates take theirs.",
                expected='granularity "coupled" alone',
                got=f"other gates on {single!r}",
                hint='unit="params"',
            )
        )
    positions = _positions(model, unit, example_inputs)
    linear, square, constant = np.zeros(len(gated)), zeros, 0.0
    for number, one in enumerate(gated):
        for site in _every_use(one, unit) if one.coupled is None else ():
            each = 1.0 if positions is None else positions.get((id(site.module), site.tensor_name), 0.0)
            linear[number] += each * site.weight.numel() / counts[number]
    otherwise = {site.name for one in every if one.coupled is None for site in one.sites}
    for plan, prefix, numbers in _plans(gated):
        tensors = plan.tensors(frozenset(name.removeprefix(prefix) for name in otherwise))
        for names, sites in tensors.items():
            inside = [number in numbers for number, _ in sites]
            if not whole and not all(inside):
                if any(inside):
                    raise _shared(prefix + names[0])
                continue
            each = float(_bytes(model, prefix + names[0])) if unit == "memory" else 1.0
            if positions is not None:
                each = _uses(model, [prefix + name for name in names], positions)
            constant += plan.add_product(linear, square, each, sites, numbers)
    floor = np.array([one.coupled is not None for one in gated], np.int64)
    size = Size(counts, constant, linear, square, floor)
    return replace(size, constant=constant + _total(model, every, unit, positions) - size.whole) if whole else size


def _every_use(one: Gated, unit: Unit) -> Sequence[Site]:
    """The weights behind gates: tied ones once for parameters, at each of their sites for multiply-adds."""
    return list(one.weights()) if unit == "params" else one.sites


def _positions(model: nn.Module, unit: Unit, example_inputs: ExampleInputs | None) -> Positions | None:
    if unit != "macs":
        return None
    if example_inputs is None:
        raise SpecError(
            explain(
                "budget",
                "multiply-adds are counted by running the model.",
                got="no example_inputs",
                hint='sparsify(model, spec, budget=Budget(sparsity=0.5, unit="macs"), example_inputs=(x,))',
            )
        )
    return count_positions(model, example_inputs)


def _uses(model: nn.Module, names: Sequence[str], positions: Positions) -> float:
    """Multiply-adds of each element of a parameter, at all places that go by these names."""
    parts = [name.rpartition(".") for name in names]
    keys = {(id(model.get_submodule(module)), tensor_name) for module, _, tensor_name in parts}
    return sum(positions.get(key, 0.0) for key in keys)


def _plans(gated: Sequence[Gated]) -> list[tuple[CoupledPlan, str, dict[int, int]]]:
    """The plans of coupled gates, what a wrapper puts before their names, and each group's place in ``gated``."""
    found: dict[int, tuple[CoupledPlan, str, dict[int, int]]] = {}
    for number, one in enumerate(gated):
        if one.coupled is not None:
            _, _, numbers = found.setdefault(id(one.coupled.plan), (one.coupled.plan, one.coupled.prefix, {}))
            numbers[one.coupled.number] = number
    return list(found.values())


def _bytes(model: nn.Module, name: str) -> int:
    """The bytes of one element of a parameter."""
    module, _, tensor_name = name.rpartition(".")
    return dict(tensors_of(model.get_submodule(module)))[tensor_name].element_size()


def _total(model: nn.Module, every: Sequence[Gated], unit: Unit, positions: Positions | None) -> float:
    """The size of the whole model, without the gates' own parameters."""
    if positions is None:
        own = {id(p) for one in every for p in one.gate.parameters()}
        found = [p for p in model.parameters() if id(p) not in own and not isinstance(p, UninitializedParameter)]
        each = [p.element_size() if unit == "memory" else 1 for p in distinct(found)]  # tied ones once
        return float(sum(p.numel() * n for p, n in zip(distinct(found), each, strict=True)))
    return total_macs(model, positions)


def _shared(name: str) -> SpecError:
    return SpecError(
        explain(
            repr(name),
            "parameters and multiply-adds can be budgeted in parts only where the parts share no tensor.",
            got="gates of two budgets on it",
            hint='one budget for all gates, or unit="gates"',
        )
    )
