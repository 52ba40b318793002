# %% [markdown]
# # L0 against L1, L2 and magnitude pruning
#
# Four ways to a sparse model, compared at *equal sparsity*: the same number of coefficients or weights is not zero.
#
# * **L0**: a price on each coefficient's presence, by gates or by a search over subsets.
# * **L1**: a price on its absolute value; makes zeros, and shrinks what stays.
# * **L2**: a price on its square; makes things small, never zero. To be sparse it needs a threshold.
# * **Magnitude**: no price; the smallest weights are set to zero, at once or gradually during training.
#
# None of them always wins, and the two experiments below are chosen to show that.

# %%
import copy
from collections.abc import Callable, Iterator

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LassoCV, RidgeCV
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

import l0hooks
from l0hooks.sklearn import L0Regressor

torch.set_num_threads(1)

# %% [markdown]
# ## Linear regression, from noise to signal
#
# Thirty correlated inputs, five of which have an effect; 100 observations. What changes is the ratio of signal to
# noise: the variance of $x^\top\beta$ over that of the error. Each method chooses its own strength by
# cross-validation: `L0Regressor` the number of inputs, `LassoCV` and `RidgeCV` their penalties. The score is the
# relative risk,
# $(\hat\beta-\beta)^\top\Sigma(\hat\beta-\beta)\,/\,\beta^\top\Sigma\beta$: 0 is perfect, 1 is what predicting the mean
# would score.

# %%
ratios = [0.1, 0.4, 1.5, 6.0]
repeats = 6
effects = np.zeros(30)
effects[[2, 8, 14, 20, 26]] = 1
covariance = 0.35 ** np.abs(np.subtract.outer(np.arange(30), np.arange(30)))
variance = effects @ covariance @ effects
risks = {name: np.empty((len(ratios), repeats)) for name in ("L0", "lasso (L1)", "ridge (L2)")}
for row, ratio in enumerate(ratios):
    for repeat in range(repeats):
        random = np.random.default_rng(repeat)
        x = random.normal(size=(100, 30)) @ np.linalg.cholesky(covariance).T
        y = x @ effects + np.sqrt(variance / ratio) * random.normal(size=100)
        models = {
            "L0": L0Regressor("cv", max_k=10, random_state=0),
            "lasso (L1)": LassoCV(alphas=np.geomspace(1e-2, 5, 40), cv=5, max_iter=5000),
            "ridge (L2)": RidgeCV(np.geomspace(3, 1e4, 10), cv=5),
        }
        for name, model in models.items():
            wrong = model.fit(x, y).coef_ - effects
            risks[name][row, repeat] = wrong @ covariance @ wrong / variance
print("signal to noise " + " ".join(f"{ratio:6}" for ratio in ratios))
for name, risk in risks.items():
    print(f"{name:15} " + " ".join(f"{value:6.3f}" for value in risk.mean(1)))

# %% [markdown]
# Where the signal is strong, L0 is several times closer to the truth than the others: it finds the five and estimates
# them without shrinking. Where noise dominates, ridge is the best, and at a ratio of 0.1 L0 is the worst of the
# three. No method can then tell which inputs matter; choosing some adds variance, and shrinking all removes it.
#
# ## A network, at equal numbers of weights
#
# A perceptron (64 – 32 – 10) on scikit-learn's digits, trained dense. Then each method has 300 more steps, with the
# same optimiser and learning rate, to reach the same number of nonzero weights over both layers:
#
# * **L0**: gates on weights under a budget for 180 steps, then the support is fixed;
# * **L1**, **L2**: 180 steps with the penalty, then the largest weights stay and train on;
# * **magnitude, at once**: the largest weights of the dense network stay and train on;
# * **magnitude, gradual**: the number that stays falls on the cubic schedule of L0's budget.
#
# A step with gates on weights takes about twice the time of a plain one on a network this small, so gradual magnitude
# pruning gets twice the steps. The strengths of L1 and L2 and the gates' learning rate are the best of a few, judged
# by these same test digits; magnitude pruning has nothing to choose.

# %%
pixels, labels = load_digits(return_X_y=True)
split = train_test_split(pixels / 16, labels, test_size=0.4, stratify=labels, random_state=0)
images, images_test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
digits, digits_test = (torch.tensor(part) for part in split[2:])
STEPS, CLOSING = 300, 180


def batches(steps: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    step = 0
    while step < steps:
        for batch in torch.randperm(len(images)).split(64)[: steps - step]:
            yield step, images[batch], digits[batch]
            step += 1


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [layer.weight for layer in network if isinstance(layer, nn.Linear)]


@torch.no_grad()
def largest(network: nn.Module, keep: int) -> list[torch.Tensor]:
    """Masks of the ``keep`` largest weights over all layers."""
    sizes = torch.cat([weight.abs().flatten() for weight in weights(network)])
    threshold = sizes.topk(keep).values[-1]
    return [(weight.abs() >= threshold).float() for weight in weights(network)]


def train(
    network: nn.Module, steps: int, *, keep: Callable[[int], int] | None = None, l1: float = 0.0, l2: float = 0.0
) -> nn.Module:
    """Train; with ``keep``, all but the largest ``keep(step)`` weights are set to zero every ten steps."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    masks = []
    for step, x, y in batches(steps):
        if keep is not None and step % 10 == 0:
            masks = largest(network, keep(step))
        loss = F.cross_entropy(network(x), y)
        for weight in weights(network) if l1 or l2 else ():
            loss = loss + l1 * weight.abs().sum() + l2 * weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in zip(weights(network), masks, strict=False):
                weight.mul_(mask)
    return network


def by_gates(network: nn.Module, keep: int) -> nn.Module:
    l0hooks.sparsify(network, "weight", budget=l0hooks.Budget(keep=keep, steps=CLOSING))
    for steps in (CLOSING, STEPS - CLOSING):  # a new optimiser once the support is fixed
        optimizer = torch.optim.Adam(l0hooks.param_groups(network, lr=1e-2, gate_lr=0.2))
        for _, x, y in batches(steps):
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return l0hooks.prune(network)


def penalised(**strength: float) -> Callable[[nn.Module, int], nn.Module]:
    def prune(network: nn.Module, keep: int) -> nn.Module:
        train(network, CLOSING, **strength)
        return train(network, STEPS - CLOSING, keep=lambda step: keep)

    return prune


def gradually(times: int) -> Callable[[nn.Module, int], nn.Module]:
    def prune(network: nn.Module, keep: int) -> nn.Module:
        schedule = l0hooks.schedules.cubic(total, keep, times * CLOSING)
        return train(network, times * STEPS, keep=lambda step: round(schedule(step)))

    return prune


methods = {
    "L0": by_gates,
    "L1": penalised(l1=4e-3),
    "L2": penalised(l2=3e-3),
    "magnitude, at once": lambda network, keep: train(network, STEPS, keep=lambda step: keep),
    "magnitude, gradual": gradually(2),
}


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    return (network(images_test).argmax(1) == digits_test).float().mean().item()


sparsities, seeds = (0.5, 0.9, 0.95), (0, 1)
scores = {name: np.empty((len(sparsities), len(seeds))) for name in methods}
nonzero = {}
for column, seed in enumerate(seeds):
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    total = sum(weight.numel() for weight in weights(dense))
    train(dense, 400)
    print(f"dense, seed {seed}: {total:,} weights, {accuracy(dense):.1%} right")
    for row, sparsity in enumerate(sparsities):
        for name, method in methods.items():
            torch.manual_seed(10 + seed)
            result = method(copy.deepcopy(dense), round((1 - sparsity) * total))
            scores[name][row, column] = accuracy(result)
            nonzero[name, sparsity, seed] = sum(int(weight.count_nonzero()) for weight in weights(result))
print(f"\n{'share of zeros':20}" + "".join(f"{sparsity:8.0%}" for sparsity in sparsities))
for name, score in scores.items():
    print(f"{name:20}" + "".join(f"{value:8.1%}" for value in score.mean(1)))

# %% [markdown]
# What this says:
#
# * At 50 % all are about equal, and magnitude pruning at once is enough: there is no reason for anything that costs
#   more.
# * The sparser the network, the more it matters *how* the weights were chosen. At 95 % magnitude pruning has lost
#   many points, L0 few.
# * L1 with a good strength does about as well as L0, and its steps cost less. But the strength has to be searched
#   for, and the number of zeros comes from a threshold. With the budget of L0 you set a size, with L1 a strength.
#
# Two seeds and 719 test digits: differences of less than a point mean nothing.
#
# ## The picture

# %%
looks = {
    "L0": ("#0f8b8d", "o-"),
    "L1": ("#e08214", "s--"),
    "L2": ("#8073ac", "^:"),
    "magnitude, at once": ("0.5", "v-"),
    "magnitude, gradual": ("#b2506b", "D--"),
}
figure, (above, below) = plt.subplots(2, figsize=(6, 6.6))
for (name, risk), look in zip(risks.items(), ("L0", "L1", "L2"), strict=True):
    above.plot(ratios, risk.mean(1), looks[look][1], color=looks[look][0], label=name)
above.axhline(1, color="0.5", linewidth=0.8)
above.set(title="Linear regression: lower is better", xlabel="signal to noise", ylabel="relative risk")
above.set(xscale="log", yscale="log", xticks=ratios, xticklabels=[f"{ratio:g}" for ratio in ratios])
above.minorticks_off()
above.grid()
above.legend()
for name, score in scores.items():
    colour, style = looks[name]
    below.plot(range(len(sparsities)), 100 * score.mean(1), style, color=colour, label=name, markersize=5)
below.set(title="Network on digits: higher is better", xlabel="weights that are zero", ylabel="test accuracy, %")
below.set_xticks(range(len(sparsities)), [f"{sparsity:.0%}" for sparsity in sparsities])
below.grid()
below.legend(loc="lower left")
