"""Two exports of a model are matched operator by operator, whatever passes its input on unchanged."""

import pytest
import torch
from torch import nn

from l0hooks import iter_gates, prune, sparsify

PASSING = {
    "nothing": lambda h: h,
    "a slice of everything": lambda h: h[:, slice(0, None)],
    "a slice up to the length": lambda h: h[:, :5],
    "a slice of all channels": lambda h: h[..., :16],
    "an ellipsis": lambda h: h[...],
    "detach": lambda h: h.detach(),
}


class Head(nn.Module):
    """A size by hand before what passes on: the modules cannot be cut, the graph can."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(8, 16), nn.Linear(16, 3), how

    def forward(self, x):
        h = torch.relu(self.a(x)).view(x.shape[0], -1, 16)
        return self.b(PASSING[self.how](h))


@pytest.mark.parametrize("how", PASSING)
def test_what_passes_on_does_not_keep_a_graph_from_being_cut(how):
    model, x = Head(how).double(), torch.randn(2, 5, 8).double()
    sparsify(model, "coupled", example_inputs=(x,))
    for _, gate in iter_gates(model):
        gate.log_alpha.data[::3] = -9.0
    small = prune(model.eval(), example_inputs=(x,))
    assert isinstance(small, torch.fx.GraphModule)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(small(x[:1]), model(x[:1]), rtol=0, atol=1e-12)
