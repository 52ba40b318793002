"""Plans of the right digest that were changed in every field: refused by our error, or a model of the right kind."""

import math

import pytest
import torch
from mutations import mutations
from torch import nn

from l0hooks import iter_gates, load_pruned, prune, save_pruned, sparsify
from l0hooks.errors import L0HooksError
from l0hooks.export import safetensors_file as storage


class Whole(nn.Module):
    """A convolution, a norm, a tied layer, a buffer outside the state, a size of its own and an extra state."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(2, 6, 3, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.c = nn.Linear(6, 3)
        self.c.weight = self.b.weight
        self.width, self.extra = 6, {"seen": torch.ones(2), "rate": 0.5, "names": ["a", (1, None)]}
        self.register_buffer("scale", torch.rand(6, 1), persistent=False)

    def forward(self, x):
        h = (self.norm(self.a(x)).relu() * self.scale).mean(2)
        return self.b(h) + self.c(h)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class Reshaping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, times):
        return self.b(self.a(x).relu().reshape(-1, 8)) * times


def small(build, inputs):
    torch.manual_seed(0)
    model = build().eval()
    sparsify(model, "coupled", example_inputs=inputs)
    for _, gate in iter_gates(model):
        gate.log_alpha.data[1:3] = -9.0
    return prune(model, example_inputs=inputs).eval()


@pytest.mark.slow  # tests/unit/export/test_save.py refuses a few plans
@pytest.mark.parametrize(
    ("build", "inputs", "most"),
    [
        pytest.param(Whole, (torch.randn(2, 2, 5),), 2, id="modules"),
        pytest.param(Reshaping, (torch.randn(2, 4), 2.0), 1, id="a graph"),
    ],
)
def test_a_changed_plan_is_refused_by_our_error(build, inputs, most, tmp_path):
    path = tmp_path / "small.safetensors"
    save_pruned(small(build, inputs), path)
    tensors, plan = storage.read(path)
    refused, loaded, raw = 0, 0, []
    for what, changed in mutations(plan, most):
        if not isinstance(changed, dict):
            continue
        storage.write(tensors, changed, path)
        try:
            model = load_pruned(build, path)
        except L0HooksError as error:
            assert str(path) in str(error), what  # noqa: PT017
            refused += 1
        except Exception as error:  # noqa: BLE001
            raw.append(f"{what}: {type(error).__name__}: {error}"[:300])
        else:
            loaded += 1
            kinds = {type(v) for m in model.modules() for k, v in vars(m).items() if k in ("width", "out_features")}
            assert kinds <= {int}, what
            assert not any(type(v) is float and math.isnan(v) for m in model.modules() for v in vars(m).values())
    assert not raw
    assert refused > 3 * loaded
