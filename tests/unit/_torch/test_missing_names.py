"""A private name that torch has lost costs speed or one feature, never the import and never the right noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from l0hooks import sparsify
from l0hooks._torch import autograd, modules, tensors
from l0hooks._torch.names import MissingTorchNameError

SCRIPT = Path(__file__).parents[2] / "shared" / "without_names.py"
NODE = "_C._current_autograd_node"
PASS = "_C._current_graph_task_id"
LEVEL = "_C._functorch.maybe_current_level"
FLAGS = "fx._symbolic_trace.is_fx_symbolic_tracing+fx._symbolic_trace._is_fx_tracing_flag"
TREES = "utils._pytree.tree_leaves+utils._pytree.tree_map+utils._pytree.tree_map_only"
CHECKPOINTS = ("checkpointed", "checkpointed_reentrant")
# names that are taken away together -> checks that may then be refused, by an error that says so
REFUSED: dict[str, tuple[str, ...]] = {
    NODE: CHECKPOINTS,
    PASS: (),
    f"{NODE}+{PASS}": CHECKPOINTS,
    "_C._will_engine_execute_node": (),
    "_C._get_tracing_state": (),
    "_C._autograd._get_sequence_nr": (),
    "_C._autograd._top_saved_tensors_default_hooks": (),
    LEVEL: ("functional",),
    "_C._functorch.is_legacy_batchedtensor": (),
    "_C._functorch.is_gradtrackingtensor": (),
    "_C._functorch.get_unwrapped": (),
    "_C._functorch.is_batchedtensor": (),
    "_C._dynamo.eval_frame": (),
    "fx._symbolic_trace": (),
    "fx._symbolic_trace.is_fx_symbolic_tracing": (),
    FLAGS: (),
    "autograd.forward_ad._current_level": ("forward_mode",),
    "nn.modules.module._has_any_global_hook": (),
    "nn.modules.batchnorm._NormBase": (),
    "utils._python_dispatch._disable_current_modes": (),
    TREES: ("pruning",),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, list[float] | str]]:
    """What training, checkpointing, evaluation and pruning give without each name; with all of them under ``""``."""
    root = str(SCRIPT.parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "", *REFUSED],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_with_every_name_all_checks_give_numbers(outcomes: dict[str, dict[str, list[float] | str]]) -> None:
    whole = outcomes[""]
    assert not [check for check, found in whole.items() if isinstance(found, str)]
    assert whole["checkpointed"] == whole["checkpointed_reentrant"] == whole["training"]


@pytest.mark.slow
def test_without_a_name_the_noise_is_right_or_an_error_is_raised(
    outcomes: dict[str, dict[str, list[float] | str]],
) -> None:
    whole = outcomes[""]
    for names, allowed in REFUSED.items():
        found = outcomes[names]
        assert found.keys() == whole.keys(), (names, found)
        for check, result in found.items():
            if isinstance(result, str):
                assert check in allowed, f"{names}, {check}: {result}"
            else:  # the plain formulas round differently; other noise moves the sums by more than a tenth
                assert result == pytest.approx(whole[check], rel=1e-3, abs=1e-4), (names, check)


@pytest.mark.slow
def test_checkpointing_is_refused_by_name(outcomes: dict[str, dict[str, list[float] | str]]) -> None:
    for check in CHECKPOINTS:
        assert str(outcomes[NODE][check]).startswith("MissingTorchNameError")
        assert "torch._C._current_autograd_node" in outcomes[NODE][check]


def test_a_node_without_a_number_is_refused_by_name() -> None:
    with pytest.raises(
        MissingTorchNameError, match=r"checkpointing .* needs torch\.autograd\.graph\.Node\._sequence_nr"
    ):
        autograd.node_number(object())


def test_noise_under_transforms_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack")
    with pytest.raises(MissingTorchNameError, match="temporarily_clear_interpreter_stack"):
        autograd.outside_transforms()


def test_a_module_without_tables_of_hooks_is_read_in_torchs_own_way() -> None:
    class Bare:
        pass

    assert modules.is_hooked(Bare())  # type: ignore[arg-type]


def test_a_module_without_a_table_of_parameters_is_refused_by_name() -> None:
    with pytest.raises(MissingTorchNameError, match=r"nn\.Module\._parameters"):
        modules.parameters_of(object())  # type: ignore[arg-type]


def test_without_versions_nothing_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l0hooks.attach.folded_weight.version", tensors._never_the_same)
    layer = nn.Linear(6, 4)
    sparsify(layer, "weight")
    with torch.no_grad():
        layer.eval()
        first: Tensor = layer.weight
        layer.parametrizations.weight.original.mul_(2)  # type: ignore[operator, union-attr]
        assert torch.equal(layer.weight, 2 * first)
