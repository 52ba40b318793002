"""The tables of the migration pages: no public name is missing, and what the right-hand columns call can be called."""

import ast
import inspect
import re
import sys
from functools import cache

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from public_names import DOCS, SPAN, names_in, names_of_amlab, names_of_l0_python, rows
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import l0hooks
from l0hooks import calibration, schedules
from l0hooks.sklearn import L0Regressor

L0_PYTHON = ("migration_l0_python.md", "calibration_migration.md")
AMLAB = ("migration_amlab.md",)
DEFECTS = {
    "test_wrong_in_l0_python": "migration.md",
    "test_wrong_in_calibration": "calibration_migration.md",
    "test_wrong_in_amlab": "migration_amlab.md",
}


def test_no_public_name_of_the_installed_l0_python_is_missing():
    names = set(names_of_l0_python())
    assert len(names) > 250
    assert sorted(names - names_in(*L0_PYTHON)) == []


def test_no_public_name_of_amlabs_layers_and_models_is_missing():
    assert sorted(set(names_of_amlab()) - names_in(*AMLAB)) == []


@pytest.mark.parametrize("page", [*L0_PYTHON, *AMLAB])
def test_the_left_columns_name_nothing_that_is_not_there(page):
    known = set(names_of_amlab()) if page in AMLAB else set(names_of_l0_python())
    classes = {name for name in known if re.fullmatch(r"\w+", name)}
    found = {name for name in names_in(page) if re.split(r"[.(]", name)[0] in classes}
    assert sorted(found - known) == []


@cache
def survey():
    rng = np.random.default_rng(0)
    matrix = sp.csr_array(rng.random((4, 30)))
    calibrator = calibration.Calibrator(8, max_epochs=5, progress=False)
    return matrix, calibrator.fit(matrix, matrix @ np.full(30, 2.0)), calibrator


def namespace(span):
    """What the spans of a right-hand column speak of; new for each, for some of them change it."""
    M, result, calibrator = survey()
    gates = "sparsify(" not in span
    model = nn.Sequential(nn.Linear(4, 3), *([nn.Linear(3, 2)] if 'sparsify(model, "coupled"' in span else []))
    inputs = (torch.zeros(1, 4),)
    reports = {}
    if gates:
        l0hooks.sparsify(model, "weight", example_inputs=inputs)
        reports = {"report": l0hooks.summary(model), "tracker": l0hooks.Tracker(model)}
        reports["tracker"].log(loss=1.0)
    X = sp.csr_array(np.random.default_rng(0).normal(size=(20, 5)))
    modules = {"l0hooks": l0hooks, "schedules": schedules, "torch": torch, "nn": nn, "np": np}
    names = {name: getattr(l0hooks, name) for name in l0hooks.__all__}
    others = {"Calibrator": calibration.Calibrator, "L0Regressor": L0Regressor, "AveragedModel": AveragedModel}
    models = {"model": model, "layer": model[0], "gate": l0hooks.Gate(8), "inputs": inputs, "ema": get_ema_multi_avg_fn}
    tensors = {"x": torch.ones(8, 4), "w": torch.ones(8), "log_alpha": torch.zeros(8), "u": torch.rand(8)}
    arrays = {"X": X, "target": X @ np.arange(5.0), "M": M, "y": M @ np.full(30, 2.0), "design": np.ones(30)}
    fitted = {"result": result, "calibrator": calibrator, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    return modules | names | others | models | reports | tensors | arrays | fitted | {"print": lambda *_: None}


def calls():
    """Every span of a right-hand column that is code, once, with the page that has it first."""
    found = {}
    for page in (*L0_PYTHON, *AMLAB):
        for cells in rows(page):
            for span in SPAN.findall(cells[1]) if len(cells) > 1 else ():
                if is_code(span):
                    found.setdefault(span, pytest.param(span, id=f"{page.removesuffix('.md')}: {span}"))
    return list(found.values())


def is_code(span):
    """Calls and attributes; not bare names, shell commands or strings."""
    try:
        tree = ast.parse(span)
    except SyntaxError:
        return False
    return any(isinstance(node, (ast.Call, ast.Attribute)) for node in ast.walk(tree)) and not span.startswith("test_")


@pytest.mark.filterwarnings("ignore:.*gates with equal log_alpha:l0hooks.errors.L0HooksWarning")  # they are untrained
@pytest.mark.parametrize("span", calls())
def test_what_a_right_hand_column_calls_can_be_called(span, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(span, span, "exec"), namespace(span))


def test_most_of_the_right_hand_columns_are_code():
    assert len(calls()) > 120


@pytest.mark.parametrize(("module", "page"), DEFECTS.items(), ids=str)
def test_every_defect_of_a_table_has_its_test_and_every_test_its_line(module, page):
    __import__(module)
    tests = {
        name for name, _ in inspect.getmembers(sys.modules[module], inspect.isfunction) if name.startswith("test_")
    }
    text = (DOCS / page).read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+)`", text)) == tests


def test_the_overview_links_to_the_pages():
    text = (DOCS / "migration.md").read_text(encoding="utf-8")
    assert all(f"({page})" in text for page in (*L0_PYTHON, *AMLAB))
