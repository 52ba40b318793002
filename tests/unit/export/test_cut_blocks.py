"""pruned(x) = gated.eval()(x) with blocks, channels and neurons at once, on a ResNet and an encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from l0hooks import GateSpec, load_pruned, prune, save_pruned, sparsify, summary
from l0hooks.attach.walk import iter_gated


class Basic(nn.Module):
    """A ResNet's block; with another number of channels it has a projection as shortcut."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer)
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def resnet() -> nn.Module:
    stages = [nn.Sequential(Basic(4, 6), Basic(6, 6), Basic(6, 6)), nn.Sequential(Basic(6, 8), Basic(8, 8))]
    return nn.Sequential(nn.Conv2d(3, 4, 3), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


class Layer(nn.Module):
    """A pre-norm layer with torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(self.up(self.norm2(x)).relu())


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), *(Layer() for _ in range(4)), nn.LayerNorm(8), nn.Linear(8, 3))


IMAGES, WORDS = torch.randn(3, 3, 9, 9), torch.randn(3, 6, 5)
CASES = [(resnet, IMAGES, ["1.1", "1.2", "2.1"]), (encoder, WORDS, ["1", "2", "3", "4"])]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "x", "names"), CASES, ids=["resnet", "encoder"])
@pytest.mark.parametrize("seed", range(2))
def test_blocks_and_what_is_in_them_are_cut_together(
    make: Callable[[], nn.Module], x: Tensor, names: list[str], seed: int, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    model = make()
    for _ in range(2):
        model(x)  # statistics of the norms
    model.eval()
    spec = GateSpec(granularity="coupled", kinds=("channel", "neuron", "head", "layer"))
    sparsify(model, spec, example_inputs=(x,))
    layers = [one for one in iter_gated(model) if one.layer]
    assert [one.name for one in layers] == names
    for one in iter_gated(model):
        one.gate.log_alpha.data.copy_(2 * torch.randn(one.gate.log_alpha.shape))
    layers[seed].gate.log_alpha.data.fill_(-9.0)
    small, report = prune(model, example_inputs=(x,), return_report=True)
    torch.testing.assert_close(small(x), model(x))
    assert report.exported_parameters == report.model_parameters_kept == summary(model).model_parameters_kept
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(make, tmp_path / "small.safetensors").eval()
    assert torch.equal(again(x), small(x))
