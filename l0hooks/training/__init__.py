"""What a training loop needs: penalties, budgets, parameter groups, schedules at work, and the tracker."""

from l0hooks.training._finish_budget import finish_budget
from l0hooks.training._keep_zeros import KeptZeros, keep_zeros
from l0hooks.training._param_groups import param_groups
from l0hooks.training._recipe import Recipe, RecipeScheduler, recipe
from l0hooks.training._recover import RecoveredLayer, Recovery, recover
from l0hooks.training._score import Scores, score
from l0hooks.training._set_budget import set_budget
from l0hooks.training.budget import Budget
from l0hooks.training.budget_rule import BudgetRule
from l0hooks.training.clocks import Clock
from l0hooks.training.distillation import Distillation
from l0hooks.training.lagrangian import LagrangianRule
from l0hooks.training.latency import latency_table
from l0hooks.training.measured_target import Measured
from l0hooks.training.metrics import ScalarWriter
from l0hooks.training.penalties import penalty, register_penalty
from l0hooks.training.scheduled import Scheduled, temperature_schedule
from l0hooks.training.size import Size
from l0hooks.training.time_table import LatencyTable, LayerTimes
from l0hooks.training.timed_rule import TimedRule
from l0hooks.training.tracker import Tracker

__all__ = [
    "Budget",
    "BudgetRule",
    "Clock",
    "Distillation",
    "KeptZeros",
    "LagrangianRule",
    "LatencyTable",
    "LayerTimes",
    "Measured",
    "Recipe",
    "RecipeScheduler",
    "RecoveredLayer",
    "Recovery",
    "ScalarWriter",
    "Scheduled",
    "Scores",
    "Size",
    "TimedRule",
    "Tracker",
    "finish_budget",
    "keep_zeros",
    "latency_table",
    "param_groups",
    "penalty",
    "recipe",
    "recover",
    "register_penalty",
    "score",
    "set_budget",
    "temperature_schedule",
]
