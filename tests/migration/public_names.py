"""The public names of l0-python, by looking; those of AMLab's research code, listed; and those a page's tables name."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import l0
from torch import nn

DOCS = Path(__file__).parents[2] / "docs"
SPAN = re.compile(r"`([^`]+)`")

INSTANCES: dict[str, list[Callable[[], Any]]] = {  # what shows the attributes that only an object has
    "HardConcrete": [lambda: l0.HardConcrete(2)],
    "L0Linear": [lambda: l0.L0Linear(2, 2)],
    "L0Conv2d": [lambda: l0.L0Conv2d(2, 2, 1), lambda: l0.L0Conv2d(2, 2, 1, structured=True)],
    "L0DepthwiseConv2d": [lambda: l0.L0DepthwiseConv2d(2, 1)],
    "SparseMLP": [lambda: l0.SparseMLP(2, 2, 2)],
    "SparseL0Linear": [lambda: l0.SparseL0Linear(2)],
    "SparseCalibrationWeights": [lambda: l0.SparseCalibrationWeights(2)],
    "L0Gate": [lambda: l0.L0Gate(2)],
    "SampleGate": [lambda: l0.SampleGate(4, 2)],
    "FeatureGate": [lambda: l0.FeatureGate(4, 2)],
    "HybridGate": [lambda: l0.HybridGate(40)],
    "TemperatureScheduler": [l0.TemperatureScheduler],
    "PenaltyTracker": [l0.PenaltyTracker],
}

_LAYER = (
    "reset_parameters constrain_parameters cdf_qz(x) quantile_concrete(x) regularization count_expected_flops_and_l0 "
    "get_eps(size) sample_z(batch_size,sample) sample_weights forward qz_loga weights bias droprate_init prior_prec "
    "temperature lamba local_rep use_bias floatTensor"
)
_MAP = "reset_parameters constrain_parameters regularization count_expected_flops_and_l0 forward weight bias"
_MODEL = "regularization get_exp_flops_l0 update_ema load_ema_params load_params(params) get_params forward layers N"
_WHOLE = f"{_MODEL} beta_ema avg_param steps_ema weight_decay"
AMLAB = {
    "L0Dense": f"in_features out_features bias weight_decay droprate_init temperature lamba local_rep|{_LAYER}",
    "L0Conv2d": "in_channels out_channels kernel_size stride padding dilation groups bias droprate_init temperature "
    f"weight_decay lamba local_rep|{_LAYER} dim_z input_shape",
    "MAPDense": f"in_features out_features bias weight_decay|{_MAP}",
    "MAPConv2d": f"in_channels out_channels kernel_size stride padding dilation groups bias weight_decay|{_MAP}",
    "L0MLP": f"input_dim num_classes layer_dims N beta_ema weight_decay lambas local_rep temperature|{_WHOLE} output",
    "L0LeNet5": "num_classes input_size conv_dims fc_dims N beta_ema weight_decay lambas local_rep temperature|"
    f"{_WHOLE} convs fcs",
    "BasicBlock": "in_planes out_planes stride droprate_init weight_decay lamba local_rep temperature|forward",
    "NetworkBlock": "nb_layers in_planes out_planes block stride droprate_init weight_decay lamba local_rep "
    "temperature|forward",
    "L0WideResNet": "depth num_classes widen_factor droprate_init N beta_ema weight_decay local_rep lamba temperature|"
    f"{_WHOLE} bn_params",
}


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def names_of_l0_python() -> Iterator[str]:
    """``Class``, ``Class(argument)``, ``Class.attribute``, ``Class.method(argument)``, ``function(argument)``."""
    modules = [importlib.import_module(f"l0.{found.name}") for found in pkgutil.iter_modules(l0.__path__)]
    objects = {name: getattr(l0, name) for name in l0.__all__}
    for module in modules:
        yield module.__name__
        own = {n: o for n, o in vars(module).items() if getattr(o, "__module__", "") == module.__name__}
        objects |= {n: o for n, o in own.items() if not n.startswith("_")}
    for name, thing in objects.items():
        yield name
        if not inspect.isclass(thing):
            yield from (f"{name}({argument})" for argument in parameters(thing))
            continue
        yield from (f"{name}({argument})" for argument in parameters(thing.__init__))
        for member, value in vars(thing).items():
            if not member.startswith("_"):
                yield f"{name}.{member}"
                yield from (f"{name}.{member}({a})" for a in (parameters(value) if callable(value) else []))
        for instance in (make() for make in INSTANCES[name]):
            state = vars(instance)
            inside = [*state, *state.get("_parameters", ()), *state.get("_modules", ())]
            plain = vars(nn.Module())
            yield from (f"{name}.{member}" for member in inside if not member.startswith("_") and member not in plain)


def names_of_amlab() -> Iterator[str]:
    for name, listed in AMLAB.items():
        arguments, members = listed.split("|")
        yield name
        yield from (f"{name}({argument})" for argument in arguments.split())
        for member in members.split():
            method, _, rest = member.partition("(")
            yield f"{name}.{method}"
            yield from (f"{name}.{method}({a})" for a in rest.rstrip(")").split(",") if a)


def rows(page: str) -> Iterator[list[str]]:
    """The cells of every row of the page's tables."""
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            yield [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def dotted(node: ast.expr) -> str:
    return ast.unparse(node)


def named(span: str) -> Iterator[str]:
    """The names that a code span of a first column stands for: ``f(a, b=1)`` is ``f``, ``f(a)`` and ``f(b)``."""
    try:
        node = ast.parse(span, mode="eval").body
    except SyntaxError:
        return
    if isinstance(node, ast.Call):
        name = dotted(node.func)
        yield name
        yield from (f"{name}({argument.id})" for argument in node.args if isinstance(argument, ast.Name))
        yield from (f"{name}({keyword.arg})" for keyword in node.keywords)
    elif isinstance(node, (ast.Attribute, ast.Name)):
        yield dotted(node)


def names_in(*pages: str) -> set[str]:
    return {name for page in pages for cells in rows(page) for span in SPAN.findall(cells[0]) for name in named(span)}
