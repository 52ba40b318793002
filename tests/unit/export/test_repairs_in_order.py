"""Sizes held by hand that differ from layer to layer."""

import pytest
import torch
from torch import nn

from l0hooks import iter_gates, prune, sparsify


class Attention(nn.Module):
    """Its code holds three sizes; one may equal the width of the stream, which is cut, too, to another number."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.keys, self.values = heads, heads * 4, heads * 8
        self.qkv, self.out = nn.Linear(width, heads * 16), nn.Linear(heads * 8, width)

    def forward(self, x):
        b, n, _ = x.shape
        parts = self.qkv(x).split([self.keys, self.keys, self.values], dim=-1)
        q, k, v = (part.reshape(b, n, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(b, n, self.values))


@pytest.mark.parametrize("seed", range(2))
def test_layers_that_need_different_numbers_at_one_place_stay_modules(seed):
    layers = [nn.Linear(6, 16), Attention(16, 2), Attention(16, 4), Attention(16, 3), nn.Linear(16, 3)]
    model, x = nn.Sequential(*layers).double(), torch.randn(2, 5, 6).double()
    sparsify(model, "coupled", example_inputs=(x,))
    generator = torch.Generator().manual_seed(seed)
    for _, gate in iter_gates(model):
        count = gate.log_alpha.numel()
        gate.log_alpha.data[torch.randperm(count, generator=generator)[: max(1, count // 3)]] = -9.0
    small = prune(model.eval(), example_inputs=(x,))
    assert not isinstance(small, torch.fx.GraphModule)
    assert [small[n].heads for n in (1, 2, 3)] == [1, 3, 2]
    for other in (x.flip(0), torch.randn(3, 7, 6).double()):
        torch.testing.assert_close(small(other), model(other), rtol=0, atol=1e-9)
