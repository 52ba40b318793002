"""Matrix factorisation that chooses its own factors: gates over latent factors, and exactly k of them stay.

scikit-learn's digits are a matrix of 1,797 images by 64 pixels, X ≈ U diag(z) V. Each of ``--factors`` latent factors
has a gate. After 60 % of the steps exactly ``--keep`` gates are open, and the remaining steps train these factors. The
error is compared with that of the truncated singular value decomposition of the same rank, the least that any
factorisation can have. Without ``--keep`` the rank is chosen as well: the smallest one whose error on held-out pixels
is within one per cent of the least. The results are written to ``report.json`` in ``--output``. This takes less than a
minute on a quiet machine, and a few seconds with ``--keep``:

    pip install "l0hooks[examples]"
    python examples/choose_rank.py
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import l0hooks

RANKS = (2, 4, 6, 8, 10, 12, 16, 20, 24)


class Factors(nn.Module):
    """X ≈ U diag(z) V with gates z; the columns of both factors start with similar norms, so that none is favoured."""

    def __init__(self, rows, columns, factors, keep, steps):
        super().__init__()
        self.left = nn.Parameter(torch.randn(rows, factors) / factors**0.25)
        self.right = nn.Parameter(torch.randn(factors, columns) / factors**0.25)
        self.gate = l0hooks.FeatureGate(factors, keep, steps=steps, noise="example")

    def forward(self):
        return self.gate(self.left) @ self.right


def load_data():
    x = torch.tensor(load_digits().data, dtype=torch.float32)
    x = x - x.mean(0)
    return x / x.std()


def fit(x, seen, keep, options, progress):
    """Factors with ``keep`` gates open at the end, trained on the entries that are ``seen``."""
    torch.manual_seed(options.seed)
    steps = 100 if options.quick else 600
    model = Factors(*x.shape, options.factors, keep, steps=int(0.6 * steps))
    optimizer = torch.optim.Adam(l0hooks.param_groups(model, lr=3e-2, gate_lr=1e-1))
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in progress(range(steps), desc=f"rank {keep}", leave=False):
        decay = 1e-6 * (model.left.square().sum() + model.right.square().sum())
        loss = (model() - x)[seen].square().mean() + decay
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return model.eval()


@torch.no_grad()
def error(model, x, where):
    """The relative error: 0 is perfect, and 1 is the error of the mean image."""
    return ((model() - x)[where].norm() / x[where].norm()).item()


def run(options):
    torch.set_num_threads(1)
    x = load_data()
    everything = torch.ones_like(x, dtype=torch.bool)

    def progress(steps, **keywords):
        return tqdm(steps, disable=options.quiet, **keywords)

    report = {"seed": options.seed, "factors": options.factors}
    keep = options.keep
    if keep is None:
        seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(options.seed)) < 0.8
        ranks = [rank for rank in RANKS if rank < options.factors]
        held_out = {rank: error(fit(x, seen, rank, options, progress), x, ~seen) for rank in ranks}
        keep = min(rank for rank, value in held_out.items() if value <= 1.01 * min(held_out.values()))
        report["held_out"] = held_out
    model = fit(x, everything, keep, options, progress)
    left, _ = model.gate.select(model.left)
    values = torch.linalg.svdvals(x)
    report |= {"rank": keep, "error": error(model, x, everything), "svd": (values[keep:].norm() / x.norm()).item()}
    report["rank_of_the_result"] = int(torch.linalg.matrix_rank(model()))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.json").write_text(json.dumps(report, indent=1))
    print(f"rank {keep} of {options.factors} factors, {tuple(left.shape)} left: relative error {report['error']:.4f},")
    print(f"truncated SVD of rank {keep}: {report['svd']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--factors", type=int, default=32, help="to choose from")
    parser.add_argument("--keep", type=int, help="the rank, if it is not to be chosen")
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "choose_rank")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    run(parser.parse_args())
