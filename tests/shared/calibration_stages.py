"""What every stage of a calibration promises. A new stage says how it is made and inherits the laws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import sparse

from l0hooks.calibration.fit.candidates import random_selection, with_floor
from l0hooks.calibration.fit.checkpoint import Checkpoint
from l0hooks.calibration.fit.stage import Progress, Selection, Stage, State, refit
from l0hooks.calibration.numerics.preparation import UnitOptions, prepare
from l0hooks.calibration.numerics.problem import Problem

KINDS = ("points", "intervals", "bounds", "must stay")


def survey_problem(kind: str = "points", *, rows: int = 14, households: int = 60) -> Problem:
    """A sparse matrix whose targets cannot all be met by few units."""
    rng = np.random.default_rng(0)
    matrix = sparse.random_array((rows, households), density=0.3, rng=rng, format="csr")
    targets = matrix @ rng.lognormal(0, 0.5, households) * rng.lognormal(0, 0.3, rows)
    upper = np.where(np.arange(rows) % 2, 1.1 * targets, targets) if kind == "intervals" else targets
    return prepare(
        matrix,
        targets,
        upper,
        units=UnitOptions(
            bounds=(0.3, 9.0) if kind == "bounds" else (0.0, np.inf), keep=(3, 5, 30) if kind == "must stay" else ()
        ),
        dtype="float64",
    )


def solved_problem(units: int) -> tuple[Problem, Selection]:
    """Each of ``units`` targets has one unit that adds to it; all other units take away from targets."""
    rng = np.random.default_rng(1)
    chosen = np.sort(rng.choice(6 * units, units, replace=False))
    matrix = -0.1 * rng.random((units, 6 * units))
    matrix[:, chosen] = np.eye(units)
    weights = np.zeros(6 * units)
    weights[chosen] = rng.uniform(5, 15, units)
    problem = prepare(sparse.csr_array(matrix), matrix @ weights, dtype="float64")
    return problem, Selection(chosen, weights[chosen] / problem.design[chosen])


def contents(value: Problem | Selection) -> dict[str, np.ndarray]:
    """Copies of all arrays, those of a sparse matrix included."""
    found = {}
    for field in fields(value):
        part = getattr(value, field.name)
        arrays = (part.data, part.indices, part.indptr) if sparse.issparse(part) else (part,)
        found.update({f"{field.name} {place}": np.array(one) for place, one in enumerate(arrays)})
    return found


def same(one: Selection, other: Selection) -> bool:
    """Whether two selections are equal to the bit."""
    return np.array_equal(one.units, other.units) and np.array_equal(one.g, other.g)


def steps(stage: Stage) -> Iterator[Progress]:
    """Take all steps that are left."""
    while not stage.done:
        yield stage.advance()


def finished(stage: Stage) -> Selection:
    """The selection after the last step."""
    for _ in steps(stage):
        pass
    return stage.selection()


class StageLaws:
    """Laws of :class:`~l0hooks.calibration.fit.stage.Stage`; a subclass says how its stage is made.

    Attributes
    ----------
    keep : int, optional
        How many units are asked for; None for a stage that finds their number.
    error_of_selection : bool
        Whether the error that a step reports is that of the selection after it.
    lower_bounds : bool
        Whether units that need not stay hold their lower bound as well.
    upper_bounds : bool
        Whether weights hold their upper bound; not where they are a start for the stage that follows.
    """

    keep: ClassVar[int | None] = 10
    error_of_selection: ClassVar[bool] = True
    lower_bounds: ClassVar[bool] = False
    upper_bounds: ClassVar[bool] = True

    def make(self, problem: Problem, keep: int | None) -> Stage:
        """A stage at its beginning that is to choose ``keep`` units of ``problem``."""
        raise NotImplementedError

    @classmethod
    @cache
    def recorded(cls, kind: str) -> tuple[Problem, list[tuple[Progress, Selection]]]:
        """The problem, and each step of a whole run with the selection after it."""
        problem, stage = cls().begin(kind)
        return problem, [(progress, stage.selection()) for progress in steps(stage)]

    def begin(self, kind: str = "points") -> tuple[Problem, Stage]:
        """A stage on :func:`survey_problem`."""
        problem = with_floor(survey_problem(kind), self.keep)
        return problem, self.make(problem, self.keep)

    def check(self, problem: Problem, selection: Selection) -> None:
        """Units are distinct and in order, those that must stay among them; g is finite and within bounds."""
        units, g = selection.units, selection.g
        assert len(units) == len(g)
        assert (np.diff(units) > 0).all()
        assert not len(units) or (units[0] >= 0 and units[-1] < problem.size)
        assert set(np.flatnonzero(problem.kept)) <= set(units.tolist())
        assert np.isfinite(g).all()
        assert (g >= 0).all()
        held = np.ones(len(units), np.bool_) if self.lower_bounds else problem.kept[units]
        if self.upper_bounds:
            assert (g >= problem.low[units])[held].all()
            assert (g <= problem.high[units]).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_selection_is_valid_after_every_step_and_has_the_units_asked_for_at_the_end(self, kind: str) -> None:
        problem, run = self.recorded(kind)
        for progress, found in run:
            self.check(problem, found)
            assert 0 <= progress.active <= problem.size
        assert len(found.units) == self.keep if self.keep is not None else 0 < len(found.units) < problem.size

    @pytest.mark.parametrize("kind", KINDS)
    def test_weights_have_the_error_that_is_reported_by_dense_algebra(self, kind: str) -> None:
        problem, run = self.recorded(kind)
        matrix = problem.columns.toarray().T / problem.scale[:, None] / problem.design
        lower, upper = problem.lower / problem.scale, problem.upper / problem.scale
        for progress, found in run:
            assert progress.error >= 0
            estimates = matrix @ problem.weights(found.g, found.units)
            wanted = np.abs(estimates - np.clip(estimates, lower, upper)) / problem.denominators
            if self.error_of_selection:
                assert progress.error == pytest.approx(wanted.mean(), rel=1e-9)

    def test_steps_are_numbered_up_to_the_number_announced(self) -> None:
        reports = [progress for progress, _ in self.recorded("points")[1]]
        assert [one.step for one in reports] == list(range(1, len(reports) + 1))
        assert len({(one.stage, one.steps) for one in reports}) == 1
        assert len(reports) <= reports[0].steps

    def test_equal_stages_choose_equally_and_leave_torchs_generator_alone(self) -> None:
        before = torch.random.get_rng_state()
        found = finished(self.begin()[1])
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(5)
        assert same(found, finished(self.begin()[1]))

    def test_nothing_given_is_changed(self) -> None:
        problem, stage = self.begin()
        start, before = stage.selection(), contents(problem)
        given = contents(start)
        finished(stage)
        for one, other in ((before, contents(problem)), (given, contents(start))):
            for name, array in one.items():
                np.testing.assert_array_equal(other[name], array, name)

    def test_it_resumes_bit_by_bit(self, tmp_path: Path) -> None:
        _, whole = self.begin()
        checkpoint, saved = Checkpoint(tmp_path / "fit.npz", "laws"), list[tuple[State, State | None]]()
        while not whole.done:
            if whole.resumable:
                checkpoint.write(whole.state())
                saved.append((whole.state(), checkpoint.read()))
            whole.advance()
        assert len(saved) > 1
        for states in (saved[0], saved[len(saved) // 2], saved[-1]):
            for state in states:  # in memory, unless a later step has changed it, and from a file
                _, resumed = self.begin()
                assert state is not None
                resumed.resume(state)
                assert same(finished(resumed), whole.selection())

    def test_units_that_alone_can_meet_the_targets_are_found(self) -> None:
        problem, solution = solved_problem(self.keep or 10)
        found = finished(self.make(problem, self.keep))
        assert set(solution.units) <= set(found.units)
        fitted = refit(problem, found.units, found.g, iterations=200)
        np.testing.assert_allclose(fitted.misses, 0, atol=1e-6)


class SelectionStageLaws(StageLaws):
    """Laws of a stage that begins with a selection and makes it better."""

    beginning: ClassVar[int] = 10  # units of the selection that it begins with

    def make_from(self, problem: Problem, selection: Selection, keep: int | None) -> Stage:
        """A stage that begins with ``selection``."""
        raise NotImplementedError

    def make(self, problem: Problem, keep: int | None) -> Stage:
        """From random units."""
        return self.make_from(problem, random_selection(problem, self.beginning, 0), keep)

    def test_the_selection_that_it_begins_with_is_not_changed(self) -> None:
        problem = with_floor(survey_problem(), self.keep)
        start = random_selection(problem, self.beginning, 0)
        before = contents(start)
        finished(self.make_from(problem, start, self.keep))
        for name, array in contents(start).items():
            np.testing.assert_array_equal(array, before[name])

    def test_targets_that_are_met_stay_met(self) -> None:
        problem, solution = solved_problem(self.keep or 10)
        stage = self.make_from(problem, solution, self.keep)
        errors = [progress.error for progress in steps(stage)]
        found = stage.selection()
        assert found.units.tolist() == solution.units.tolist()
        np.testing.assert_allclose(found.g, solution.g, rtol=1e-6)
        assert max(errors, default=0.0) <= 1e-6
