"""What pruning gains: cut models beside the same shapes built by hand, and CSR and BSR weights beside dense ones.

Cut: every second member of each coupled group closed; by hand: fresh weights of the same shapes, which is checked.
Sparse: one Linear layer through ``prune(sparse_format=...)``, gates closed at random. A format "wins from" the smallest
sparsity of the grid from which on it is faster than the dense layer at every larger one.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import statistics
import time
import warnings

import torch
from torch import nn

import l0hooks
from benchmarks.registry import Aim, Panel, Row, Scale, Table, register
from benchmarks.timing import ratio, rounds

CLOSED, OPEN = -4.0, 4.0
SPARSITIES = (0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5)
FORMATS = {"CSR": ("csr", "weight"), "BSR 4 × 4": ("bsr", (4, 4)), "BSR 16 × 16": ("bsr", (16, 16))}
HOPELESS = 3  # times dense: at less sparsity it only gets slower


def parameters(model: nn.Module) -> int:
    """Their number."""
    return sum(p.numel() for p in model.parameters())


def resnet(**options: object) -> nn.Module:
    """ResNet-50, or as ``options`` say."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(**options)).eval()


def bert(**options: object) -> nn.Module:
    """BERT-base, or as ``options`` say."""
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**options)).eval()


def half_resnet() -> nn.Module:
    """ResNet-50 with every width halved, by its configuration."""
    return resnet(embedding_size=32, hidden_sizes=[128, 256, 512, 1024])


def half_bert(pooled: int) -> nn.Module:
    """BERT-base with half the heads, hidden neurons and pooled features, its layers put in by hand."""
    model = bert(intermediate_size=1536)
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.query, attention.key, attention.value = (nn.Linear(768, 384) for _ in range(3))
        attention.num_attention_heads, attention.all_head_size = 6, 384
        layer.attention.output.dense = nn.Linear(384, 768)
    model.pooler.dense = nn.Linear(768, pooled)
    return model.eval()


def every_second(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> nn.Module:
    """The model pruned with every second member of each group closed."""
    gated = copy.deepcopy(model)
    l0hooks.sparsify(gated, "coupled", example_inputs=inputs)
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(gated):
            gate.log_alpha.fill_(OPEN)[::2] = CLOSED
    return l0hooks.prune(gated, example_inputs=inputs).eval()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all parameters."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@torch.no_grad()
def cut(repeats: int) -> Table:
    """ResNet-50 and BERT-base: dense, pruned, and by hand."""
    rows: list[Row] = []
    aims = []
    image, words = (torch.randn(1, 3, 224, 224),), (torch.randint(30_000, (1, 128)),)
    for name, dense, inputs in (("ResNet-50, one image", resnet(), image), ("BERT-base, 128 tokens", bert(), words)):
        small = every_second(dense, inputs)
        hand = half_resnet() if "ResNet" in name else half_bert(small.pooler.dense.out_features)
        if shapes(small) != shapes(hand):
            raise RuntimeError(f"{name}: the model built by hand has other shapes than the pruned one")
        models = {"dense": dense, "pruned": small, "by hand": hand}
        calls = {called: functools.partial(model, *inputs) for called, model in models.items()}
        seconds = rounds(calls, repeats=repeats, clock=time.process_time)
        for called, model in models.items():
            row: Row = {"model": f"{name}: {called}", "ms": statistics.median(seconds[called]) * 1e3}
            rows.append(row | {"over dense": ratio(seconds, called, "dense"), "parameters": float(parameters(model))})
        aims.append(Aim(f"{name}: pruned over by hand", ratio(seconds, "pruned", "by hand"), 1.05))
    panel = Panel("bars", ("over dense",), "time over dense", reference=1.0)
    return Table("Pruned models beside the same shapes built by hand: one forward", rows, panel, aims)


def sparse_layer(side: int, sparsity: float, called: str) -> nn.Module:
    """A layer with random gates closed, stored in the format."""
    layer = nn.Sequential(nn.Linear(side, side))
    stored, granularity = FORMATS[called]
    l0hooks.sparsify(layer, granularity)
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(layer):
            count = gate.log_alpha.numel()
            gate.log_alpha.fill_(OPEN).view(-1)[torch.randperm(count)[: round(sparsity * count)]] = CLOSED
    block = granularity if isinstance(granularity, tuple) else (4, 4)
    return l0hooks.prune(layer.eval(), sparse_format=stored, block_size=block)


def ratios(side: int, batch: int, called: str, repeats: int) -> dict[float, float]:
    """Sparsity → the format's time over dense, from the sparsest on until it is hopeless."""
    x, dense = torch.randn(batch, side), nn.Linear(side, side)
    found: dict[float, float] = {}
    for sparsity in SPARSITIES:
        calls = {"dense": functools.partial(dense, x), "it": functools.partial(sparse_layer(side, sparsity, called), x)}
        found[sparsity] = ratio(rounds(calls, repeats=repeats, clock=time.process_time), "it", "dense")
        if found[sparsity] > HOPELESS:
            break
    return found


def wins_from(found: dict[float, float]) -> str:
    """The least sparsity from which on all are faster than dense."""
    winning = list(itertools.takewhile(lambda sparsity: found[sparsity] < 1, found))
    return f"{100 * winning[-1]:g} %" if winning else "never"


@torch.no_grad()
def sparse(scale: Scale) -> list[Table]:
    """From which sparsity on each format is faster; for the middle size, all ratios."""
    wins: list[Row] = []
    tables = []
    sides = scale.of([128], [512, 1024, 2048])
    for side, batch in itertools.product(sides, scale.of([1], [1, 16, 128])):
        all_of = {called: ratios(side, batch, called, scale.repeats(15)) for called in FORMATS}
        title = f"{side} × {side}, batch {batch}"
        wins.append({"layer": title} | {f"{called} wins from": wins_from(found) for called, found in all_of.items()})
        if side == sides[len(sides) // 2]:
            rows: list[Row] = [
                {"weights kept, %": round(100 - 100 * sparsity, 3)}
                | {c: found.get(sparsity) for c, found in all_of.items()}
                for sparsity in SPARSITIES
            ]
            panel = Panel("lines", tuple(FORMATS), "time over dense", x="weights kept, %", log="xy", reference=1.0)
            cut_off = f"–: not measured, for it was {HOPELESS} times dense or more with fewer weights already"
            tables.append(Table(f"Sparse weights over dense: {title}", rows, panel, notes=[cut_off]))
    note = f"sparsities tried: {', '.join(f'{100 * s:g}' for s in reversed(SPARSITIES))} %"
    remark = f"MKL, whose sparse products torch calls: {torch.backends.mkl.is_available()}"
    return [
        Table("The sparsity from which on sparse weights are faster than dense", wins, notes=[note, remark]),
        *tables,
    ]


@register("pruned", "pruned models beside the same shapes by hand; from which sparsity CSR and BSR are faster")
def measure(scale: Scale) -> list[Table]:
    """Cut models, where transformers is installed, then sparse layers."""
    warnings.filterwarnings("ignore", "Sparse (CSR|BSR) tensor support")
    has_models = importlib.util.find_spec("transformers") is not None and not scale.quick
    return [*([cut(25)] if has_models else []), *sparse(scale)]
