"""Every stage of a calibration keeps the laws of stages."""

from calibration_stages import SelectionStageLaws, StageLaws

from l0hooks.calibration.fit.gates import GateStage
from l0hooks.calibration.fit.greedy import GreedyStage
from l0hooks.calibration.fit.priced import PricedSwapStage
from l0hooks.calibration.fit.stage import Selection, Stage
from l0hooks.calibration.fit.swaps import PruneStage, SwapStage
from l0hooks.calibration.numerics.problem import Problem


class TestGates(StageLaws):
    error_of_selection = False  # but that of the gates as they were drawn
    upper_bounds = False

    def make(self, problem: Problem, keep: int | None) -> Stage:
        return GateStage(problem, keep, epochs=20)


class TestGatesWithAPrice(TestGates):
    keep = None

    def make(self, problem: Problem, keep: int | None) -> Stage:
        return GateStage(problem, l0=0.01, epochs=20)


class TestGreedy(StageLaws):
    def make(self, problem: Problem, keep: int | None) -> Stage:
        assert keep is not None
        return GreedyStage(problem, keep, rounds=5)


class TestPrune(SelectionStageLaws):
    beginning = 60
    error_of_selection = False  # but that before the smallest contributions went

    def make_from(self, problem: Problem, selection: Selection, keep: int | None) -> Stage:
        assert keep is not None
        return PruneStage(problem, selection, keep)


class TestSwaps(SelectionStageLaws):
    keep = 30  # a tenth of them are exchanged at once
    beginning = 30
    lower_bounds = True

    def make_from(self, problem: Problem, selection: Selection, keep: int | None) -> Stage:
        return SwapStage(problem, selection)


class TestSwapsWithAPrice(SelectionStageLaws):
    keep = None
    beginning = 40

    def make_from(self, problem: Problem, selection: Selection, keep: int | None) -> Stage:
        return PricedSwapStage(problem, selection, 1e-3)
