# %% [markdown]
# # Basic L0: sparse linear regression
#
# This notebook trains a linear model that reads few of its inputs. Best subset selection minimises the squared error
# plus a price $\lambda$ for every coefficient that is not zero,
#
# $$\min_w\ \frac1{2n}\lVert y - Xw\rVert^2 + \lambda\,\lVert w\rVert_0,$$
#
# which has no gradient, because the count jumps. With a random gate $z_j \in [0, 1]$ in front of each coefficient,
# the expected count $\sum_j\,P(z_j \ne 0)$ is smooth in the gates' log-odds, so that any optimiser can lower it:
#
# $$\min_{w,\,\log\alpha}\ \mathbb E_z\,\frac1{2n}\lVert y - X(w\odot z)\rVert^2
#   + \lambda \sum_j P(z_j \ne 0).$$
#
# The data: 200 observations of 60 correlated inputs, of which eight have an effect.

# %%
import itertools

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import nn

import l0hooks

torch.set_num_threads(1)
torch.manual_seed(0)

n, p = 200, 60
support = [3, 10, 17, 24, 31, 38, 45, 52]
truth = torch.zeros(p)
truth[support] = torch.tensor([2.0, -1.5, 1.0, 1.5, -1.0, 2.0, -0.8, 0.8])
mixing = 0.6 ** (torch.arange(p)[:, None] - torch.arange(p)).abs()  # neighbours correlate by 0.6
x = torch.randn(n, p) @ torch.linalg.cholesky(mixing).T
y = x @ truth + torch.randn(n)

# %% [markdown]
# ## Gates, a price, a loop
#
# The model is an ordinary `nn.Linear`; `sparsify` puts a gate in front of each input, and `penalty` is the second sum
# above. By default gates start almost open, so that a trained model still works. Here the weights start from scratch,
# so the gates start undecided: open half of the time.


# %%
def fit(price: float, steps: int = 1000) -> tuple[nn.Linear, list[torch.Tensor]]:
    """A gated linear model after training, and its keep probabilities along the way."""
    torch.manual_seed(1)
    model = nn.Linear(p, 1)
    l0hooks.sparsify(model, l0hooks.GateSpec(granularity="input", init_keep_prob=0.5))
    (_, gate), *_ = l0hooks.iter_gates(model)
    optimizer = torch.optim.Adam(l0hooks.param_groups(model, lr=2e-2, gate_lr=3e-2))
    history = []
    for _ in range(steps):
        loss = (model(x).squeeze(1) - y).square().mean() / 2 + l0hooks.penalty(model, l0=price)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(gate.keep_prob().detach())
    return model.eval(), history


model, history = fit(price=0.05)
found = model.weight[0].detach().nonzero().squeeze(1).tolist()
print("inputs with an effect:", support)
print("inputs that stay:     ", found)

# %% [markdown]
# In evaluation the gates are fixed numbers and closed ones are exactly zero. What is left is the true support.
# `prune` folds the gates into the weights and gives back a plain `nn.Linear`.
#
# The coefficients that stay are not shrunk towards zero, as those of a lasso would be: apart from the gates' noise in
# training nothing pulls on them. Least squares on the true support is the best one could do if one knew it.

# %%
pruned = l0hooks.prune(model)
sparse = pruned.weight[0].detach()
everything = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
oracle = torch.zeros(p)
oracle[support] = torch.linalg.lstsq(x[:, support], y[:, None]).solution[:, 0]

errors = {
    "least squares on all 60 inputs": (everything - truth).norm().item(),
    "L0": (sparse - truth).norm().item(),
    "least squares on the true support": (oracle - truth).norm().item(),
}
for name, error in errors.items():
    print(f"distance to the true coefficients {error:.2f}  {name}")

# %% [markdown]
# ## The price sets the size
#
# Each price leads to one size, which you only know afterwards. If the price is too low, inputs without an effect
# stay. If it is too high, the weakest true ones go. If you know the size you want, set it instead: `Budget(keep=8)`,
# as below.

# %%
sizes, false = {}, {}
for price in (0.005, 0.02, 0.05, 0.5):
    kept = fit(price)[0].weight[0].nonzero().squeeze(1).tolist()
    sizes[price], false[price] = len(kept), len(set(kept) - set(support))
    print(f"price {price:<5}: {sizes[price]:2d} inputs stay, {false[price]} of them without an effect")

# %% [markdown]
# ## Plain SGD, real data, and a check against all subsets
#
# Nothing above needs Adam. Here is minibatch SGD without momentum on scikit-learn's diabetes data (442 patients, ten
# measurements), on a single gated `nn.Linear`. A budget says how many inputs stay; `prior=0` is right here, because
# the size of weights that are not yet trained means nothing. With ten inputs all subsets can be tried, so we know
# what the answer should be.

# %%
data, target = load_diabetes(return_X_y=True, as_frame=True)
inputs = torch.tensor(data.to_numpy(), dtype=torch.float32)
inputs = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
progression = torch.tensor(target.to_numpy(), dtype=torch.float32)
progression = (progression - progression.mean()) / progression.std(correction=0)


def choose(k: int, epochs: int = 150) -> tuple[int, ...]:
    """The k inputs that plain SGD leaves."""
    torch.manual_seed(0)
    model = nn.Linear(10, 1)
    l0hooks.sparsify(model, "input", budget=l0hooks.Budget(keep=k, steps=5 * epochs, prior=0.0))
    optimizer = torch.optim.SGD(l0hooks.param_groups(model, lr=0.05, gate_lr=1.0))
    for _ in range(epochs):
        for batch in torch.randperm(442).split(64):
            loss = (model(inputs[batch]).squeeze(1) - progression[batch]).square().mean() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return tuple(l0hooks.prune(model).weight[0].detach().nonzero().squeeze(1).tolist())


def squared_error(columns: tuple[int, ...]) -> float:
    """Of least squares on some columns, per patient."""
    part = inputs[:, columns].double()
    residual = progression.double() - part @ torch.linalg.lstsq(part, progression.double()[:, None]).solution[:, 0]
    return residual.square().mean().item()


place, excess = {}, {}
for k in (2, 3, 4):
    chosen = choose(k)
    losses = {columns: squared_error(columns) for columns in itertools.combinations(range(10), k)}
    ranking = sorted(losses, key=losses.__getitem__)
    place[k], excess[k] = ranking.index(chosen) + 1, losses[chosen] / losses[ranking[0]] - 1
    names = ", ".join(data.columns[j] for j in chosen)
    print(f"{k} inputs: {names}. Number {place[k]} of {len(losses)} subsets, {excess[k]:.1%} above the best")

# %% [markdown]
# Gates trained by gradients find good subsets, not provably the best: the six blood measurements `s1` … `s6` nearly
# determine each other, and of two inputs with the same information either may stay. For linear models
# [`L0Regressor`](../sklearn.md) searches subsets directly; gates are for models where that cannot be done.

# %% [markdown]
# ## The picture
#
# Above, the gates of the first model during training: every line is the keep probability of one input. Below, its
# coefficients that remain.

# %%
figure, (above, below) = plt.subplots(2, figsize=(6, 5.6), height_ratios=(1, 1.2))
paths = torch.stack(history)
for j in range(p):
    above.plot(paths[:, j], color="#0f8b8d" if j in support else "#e08214", linewidth=1, alpha=0.8)
above.plot([], color="#0f8b8d", label="has an effect")
above.plot([], color="#e08214", label="has none")
above.axhline(0.5, color="0.5", linewidth=0.8, linestyle="--")
above.set(title="60 gates decide", xlabel="step", ylabel="keep probability", ylim=(-0.02, 1.02))
above.legend(loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=2)

places = np.arange(p)
below.vlines(places, 0, everything, color="#e08214", linewidth=1.5, alpha=0.7, label="least squares, all inputs")
below.plot(places[sparse != 0], sparse[sparse != 0], "o", color="#0f8b8d", markersize=8, label="L0: not zero")
below.plot(support, truth[support], "_", color="0.5", markersize=18, markeredgewidth=2, label="truth")
below.axhline(0, color="0.5", linewidth=0.8)
below.set(title="Eight of sixty coefficients", xlabel="input", ylabel="coefficient")
below.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1, handletextpad=0.5)
