"""What a training loop needs: penalties, budgets, parameter groups, schedules at work, and the tracker."""

from l0hooks.training._param_groups import param_groups
from l0hooks.training._set_budget import set_budget
from l0hooks.training.budget import Budget, BudgetRule
from l0hooks.training.cost import Size
from l0hooks.training.lagrangian import LagrangianRule
from l0hooks.training.penalties import penalty, register_penalty
from l0hooks.training.scheduled import Scheduled, temperature_schedule
from l0hooks.training.tracker import ScalarWriter, Tracker

__all__ = [
    "Budget",
    "BudgetRule",
    "LagrangianRule",
    "ScalarWriter",
    "Scheduled",
    "Size",
    "Tracker",
    "param_groups",
    "penalty",
    "register_penalty",
    "set_budget",
    "temperature_schedule",
]
