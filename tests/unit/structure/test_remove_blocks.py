"""Which blocks can be removed, why others cannot, and what is renumbered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0hooks.structure.blocks import residual_blocks
from l0hooks.structure.remove_blocks import remove_blocks, renamed

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """x + f(x), as a tensor or first in a tuple, with its own number."""

    def __init__(self, number: int = 0, *, tupled: bool = False, after: nn.Module | None = None) -> None:
        super().__init__()
        self.layer_idx, self.tupled = number, tupled
        self.inner, self.after = nn.Linear(4, 4), after

    def forward(self, x: Tensor) -> Any:
        y = x + self.inner(x).relu()
        y = y if self.after is None else self.after(y)
        return (y, None) if self.tupled else y


class Plain(nn.Linear):
    """No sum."""

    def __init__(self) -> None:
        super().__init__(4, 4)


class InPlace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x += self.inner(x)
        return x


class Model(nn.Module):
    """A loop over a ModuleList, with a config."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.config = SimpleNamespace(num_hidden_layers=len(blocks), layer_types=list("abcdef"[: len(blocks)]), width=4)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            assert self.config.layer_types[number]
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
        return x


class Twice(Model):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class First(Model):
    """Needs its first block for something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.layers[0].layer_idx


def blocks(count: int, **options: Any) -> list[nn.Module]:
    return [Residual(number, **options) for number in range(count)]


FOUND: list[tuple[Any, list[str]]] = [
    (lambda: nn.Sequential(*blocks(2)), ["0", "1"]),
    (lambda: nn.Sequential(*blocks(2, after=nn.ReLU())), ["0", "1"]),
    (lambda: Model(blocks(3, tupled=True)), ["layers.0", "layers.1", "layers.2"]),
    (lambda: Model(blocks(2, after=nn.LayerNorm(4))), ["layers.0", "layers.1"]),
    (lambda: nn.Sequential(nn.Sequential(*blocks(2)), nn.Sequential(*blocks(2))), ["0.0", "0.1", "1.0", "1.1"]),
]


@pytest.mark.parametrize(("make", "names"), FOUND)
def test_sums_are_found_the_innermost_ones(make: Any, names: list[str]) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, _ = residual_blocks(model, (X,))
    assert [block.name for block in found] == names
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


REASONS: list[tuple[Any, str, str]] = [
    (lambda: nn.Sequential(Plain(), Plain()), "0", "not its input plus something"),
    (lambda: nn.Sequential(InPlace(), InPlace()), "0", "in place"),
    (lambda: Twice(blocks(2)), "layers.0", "called 2 times"),
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)), "0", "it maps"),
    (lambda: Model([block := Residual(), block]), "layers.0", "several names"),
]


@pytest.mark.parametrize(("make", "name", "reason"), REASONS)
def test_others_are_left_with_a_reason(make: Any, name: str, reason: str) -> None:
    found, reasons = residual_blocks(make(), (X,))
    assert not found
    assert reason in reasons[name]


def test_a_block_that_the_model_needs_stays() -> None:
    """Without the second block of three, the first still has its number; without the first, another one has."""
    found, reasons = residual_blocks(First([Residual(7), Residual(3), Residual(9)]), (X,))
    assert [block.name for block in found] == ["layers.1", "layers.2"]
    assert reasons == {"layers.0": "the model computes something else"}


def test_what_a_pattern_names_need_be_no_sum() -> None:
    found, _ = residual_blocks(nn.Sequential(Plain(), nn.Linear(4, 4)), (X,), named={"0"})
    assert [block.name for block in found] == ["0"]


def test_numbers_and_configs_follow_and_others_objects_do_not_change() -> None:
    model = Model(blocks(4))
    config = model.config
    model.inner = nn.Module()
    model.inner.config = config
    assert remove_blocks(model, ["layers.0", "layers.2"]) == {
        "layers.0": None, "layers.1": "layers.0", "layers.2": None, "layers.3": "layers.1",
    }  # fmt: skip
    assert [layer.layer_idx for layer in model.layers] == [0, 1]
    assert (model.config.num_hidden_layers, model.config.layer_types, model.config.width) == (2, ["b", "d"], 4)
    assert (config.num_hidden_layers, config.layer_types) == (4, ["a", "b", "c", "d"])
    assert model.inner.config is model.config
    remove_blocks(model, ["layers.0"])
    assert model.layers.kept_blocks == (4, (3,))


def test_encoders_and_decoders_have_numbers_of_their_own() -> None:
    model = nn.Module()
    model.config = SimpleNamespace(encoder_layers=2, decoder_layers=2, num_layers=2)
    model.decoder = nn.Sequential(*blocks(2))
    remove_blocks(model, ["decoder.1"])
    assert vars(model.config) == {"encoder_layers": 2, "decoder_layers": 1, "num_layers": 2}


def test_named_entries_keep_their_names() -> None:
    model = nn.Sequential()
    for name in ("first", "second", "third"):
        model.add_module(name, Residual())
    assert remove_blocks(model, ["second"]) == {"first": "first", "second": None, "third": "third"}
    assert [name for name, _ in model.named_children()] == ["first", "third"]


def test_names_of_what_lies_within_follow() -> None:
    renaming = {"a.1": None, "a.2": "a.1"}
    assert [renamed(name, renaming) for name in ("a.1.w", "a.2.b.w", "a.20.w", "c")] == [None, "a.1.b.w", "a.20.w", "c"]
