"""L0 regularisation with Hard Concrete gates that attach to any PyTorch model."""

from importlib.metadata import version

from l0hooks._preview import preview
from l0hooks._sparsify import sparsify
from l0hooks.attach._summary import summary
from l0hooks.attach.spec import GateSpec
from l0hooks.errors import L0HooksError
from l0hooks.export._prune import prune
from l0hooks.export.save import load_pruned, save_pruned
from l0hooks.gates.distribution import HardConcrete
from l0hooks.gates.gate import Gate, iter_gates, set_temperature
from l0hooks.select.gates import FeatureGate, SampleGate
from l0hooks.select.hybrid import HybridGate
from l0hooks.structure import channel_groups
from l0hooks.training._finish_budget import finish_budget
from l0hooks.training._keep_zeros import keep_zeros
from l0hooks.training._param_groups import param_groups
from l0hooks.training._recover import recover
from l0hooks.training._score import score
from l0hooks.training._set_budget import set_budget
from l0hooks.training.budget import Budget
from l0hooks.training.penalties import penalty, register_penalty
from l0hooks.training.scheduled import Scheduled, temperature_schedule
from l0hooks.training.tracker import Tracker

__version__ = version("l0hooks")

__all__ = [
    "Budget",
    "FeatureGate",
    "Gate",
    "GateSpec",
    "HardConcrete",
    "HybridGate",
    "L0HooksError",
    "SampleGate",
    "Scheduled",
    "Tracker",
    "channel_groups",
    "finish_budget",
    "iter_gates",
    "keep_zeros",
    "load_pruned",
    "param_groups",
    "penalty",
    "preview",
    "prune",
    "recover",
    "register_penalty",
    "save_pruned",
    "score",
    "set_budget",
    "set_temperature",
    "sparsify",
    "summary",
    "temperature_schedule",
]
