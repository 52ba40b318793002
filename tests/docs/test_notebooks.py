"""The notebooks run without a warning and what their prose says is so; the hook makes pages of them."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from l0hooks.training import penalties

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"
HOOK = ROOT / "docs" / "hooks" / "notebooks.py"


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_hook", HOOK)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs a notebook as the script it is and returns its variables; pytest makes warnings errors."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    monkeypatch.setattr(penalties, "_registry", dict(penalties._registry))

    def run_notebook(name: str) -> dict[str, Any]:
        names = runpy.run_path(str(NOTEBOOKS / f"{name}.py"))
        assert len(plt.get_fignums()) == 1, "each notebook ends with a picture"
        assert all(axes.get_title(loc="left") or axes.get_title() for axes in plt.gcf().axes)
        return names

    yield run_notebook
    plt.close("all")


@pytest.mark.slow
def test_basic_l0(run: Any) -> None:
    said = run("basic_l0")
    assert said["found"] == said["support"]
    assert torch.equal(said["sparse"].nonzero().squeeze(1), torch.tensor(said["support"]))
    everything, sparse, oracle = said["errors"].values()
    assert sparse < 0.5 * everything
    assert sparse < 1.5 * oracle
    sizes = list(said["sizes"].values())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 8 > sizes[-1]
    assert said["false"][0.005] > 0 == said["false"][0.5]
    assert said["place"][2] == said["place"][3] == 1
    assert said["excess"][4] < 0.02


@pytest.mark.slow
def test_neural_networks(run: Any) -> None:
    said = run("neural_networks")
    total = sum(weight.numel() for weight in said["weights"].values())
    assert total == 6464
    assert sum(said["kept"].values()) == int(0.1 * 6464)
    assert said["mlp_sparse"] > said["mlp_dense"] - 0.02 > 0.93
    shares = [said["kept"][name] / weight.numel() for name, weight in said["weights"].items()]
    assert shares[0] == min(shares)  # the first layer gives most
    blank = said["x"].amax(0) == 0
    assert blank.any()
    read_by = torch.from_numpy(said["read_by"]).flatten()
    assert read_by[blank].float().mean() < 0.25 * read_by[~blank].float().mean()
    for sparsity, network in said["smaller"].items():
        assert said["parameters"](network) <= (1 - sparsity) * said["parameters"](said["cnn"])
        assert {type(layer) for layer in network} == {type(layer) for layer in said["cnn"]}
    dense, _, fifth = said["cnn_accuracy"].values()
    assert dense > 0.97
    assert fifth > dense - 0.025


@pytest.mark.slow
def test_feature_selection(run: Any) -> None:
    said = run("feature_selection")
    assert len(said["chosen"]) == 5
    assert said["with_five"] > said["with_all"] - 0.04 > 0.9
    assert said["in_pipeline"] > 0.92
    assert len(said["pipeline"][:-1].get_feature_names_out()) == 5
    loss = {name: dict(zip(said["counts"], values.mean(0), strict=True)) for name, values in said["losses"].items()}
    assert all(loss["L0"][k] < 0.75 * loss["L1"][k] for k in (1, 2, 3, 4, 5, 6))  # few: L0
    assert loss["L1"][14] < loss["L1"][8]
    assert loss["L1"][14] < 0.75 * loss["L0"][14]  # many: L1
    assert loss["L0"][14] > loss["L0"][6]
    score = {name: dict(zip(said["terms"], values.mean(0), strict=True)) for name, values in said["scores"].items()}
    assert score["L0"][6] > score["lasso"][12] - 0.01
    assert score["L0"][8] > score["lasso"][15] - 0.01
    assert score["lasso"][15] > score["lasso"][8]
    assert score["lasso"][15] > score["L0"][15] < score["L0"][8]
    gap = np.subtract(list(score["L0"].values()), list(score["lasso, refitted"].values()))
    assert gap.mean() < 0.01  # no advantage
    assert abs(gap).max() < 0.05


@pytest.mark.slow
def test_comparison(run: Any) -> None:
    said = run("comparison")
    for (_, sparsity, _), count in said["nonzero"].items():
        assert count == round((1 - sparsity) * said["total"])
    risk = {name: values.mean(1) for name, values in said["risks"].items()}
    for row in (2, 3):  # strong signals
        assert 2 * risk["L0"][row] < min(risk["lasso (L1)"][row], risk["ridge (L2)"][row])
    for row in (0, 1):  # noise
        assert risk["ridge (L2)"][row] < min(risk["L0"][row], risk["lasso (L1)"][row])
    assert risk["L0"][0] > risk["lasso (L1)"][0]
    half, _, sparsest = ({name: values.mean(1)[row] for name, values in said["scores"].items()} for row in range(3))
    assert max(half.values()) - min(half.values()) < 0.025
    assert min(half.values()) > 0.95
    for name in ("magnitude, at once", "magnitude, gradual", "L2"):
        assert sparsest["L0"] > sparsest[name] + 0.03
    assert abs(sparsest["L0"] - sparsest["L1"]) < 0.04
    assert sparsest["L0"] > 0.86


@pytest.mark.slow
def test_advanced(run: Any) -> None:
    said = run("advanced")
    assert said["between"]["falling"] < 0.5 * said["between"]["constant"]
    assert min(said["warm_or_cold"].values()) > 0.93
    for unit, other in (("params", "macs"), ("macs", "params")):
        assert said["halves"][unit][unit] <= 0.5 < 0.6 < said["halves"][unit][other]
    assert set(said["exactly"].values()) == {236}
    for method in ("shift", "shift, linear"):
        assert all(abs(expected - scheduled) < 1 for expected, scheduled in said["traces"][method][:299])
    late = [expected - scheduled for expected, scheduled in said["traces"]["lagrangian"][:299]]
    assert max(late) > 100  # comes late
    assert min(late) < -100  # and overshoots
    random, hybrid, gated = said["misses"].values()
    assert gated < 0.5 * random
    assert gated < hybrid < 0.85 * random
    (scattered, free), (together, priced) = said["sensors"].values()
    assert together < 0.75 * scattered
    assert min(free, priced) > 0.9
    assert all(int(mask.sum()) == 16 for mask in said["masks"].values())


def test_every_notebook_is_in_the_navigation_and_tested() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    found = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
    assert len(found) == 5
    for name in found:
        assert f"notebooks/{name}.py" in navigation
        assert f"test_{name}" in globals()


def test_cells_are_read_as_text_and_code(hook: ModuleType) -> None:
    text, code = hook.read_cells("# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nx = 1\n\n\n# %%\n")[:2]
    assert (text.text, text.is_code) == ("# Title\n\nWords.", False)
    assert (code.text, code.is_code, code.line) == ("x = 1", True, 6)


@pytest.mark.slow
def test_a_page_shows_what_cells_print_and_draw_in_the_colour_of_its_text(hook: ModuleType, tmp_path: Path) -> None:
    source = (
        "# %% [markdown]\n# # Title\n\n# %%\nimport matplotlib.pyplot as plt\nprint('printed', 6 * 7)\n\n"
        "# %%\n_, axes = plt.subplots()\naxes.set_title('A <picture>')\n"
    )
    path = tmp_path / "small.py"
    path.write_text(source)
    page = hook._page(path, source)
    assert page.startswith("# Title\n\n```python\n")
    assert "``` {.text .printed}\nprinted 42\n```" in page
    assert 'aria-label="A &lt;picture&gt;"' in page
    assert "currentColor" in page
    assert hook.INK not in page
    assert "\n\n*" in page
    assert "(small/small.py)" in page
    assert sorted(tmp_path.iterdir()) == [path]  # nothing is written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "complaint"),
    [("1 / 0", "line 3, in <module>\n(.|\n)*ZeroDivisionError"), ("import warnings; warnings.warn('old')", "old")],
)
def test_a_cell_that_fails_or_warns_fails_the_build(
    hook: ModuleType, tmp_path: Path, line: str, complaint: str
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(f"# %%\nx = 0\n{line}\n")
    with pytest.raises(hook.PluginError, match=complaint):
        hook._page(path, path.read_text())
