# %% [markdown]
# # Neural networks: sparse, and smaller
#
# There are two ways to make a trained network sparse. Both are shown on scikit-learn's 1,797 handwritten digits (8 ×
# 8 pixels):
#
# * **Unstructured**: a gate on every *weight*. Most can go, and the layers keep their shapes.
# * **Structured**: a gate on every *channel*, through all layers that share it. Fewer can go, and the network that
#   remains is an ordinary smaller one, which needs less memory and time anywhere.
#
# Both start from a trained network, and for both we set the size of the result.

# %%
import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

import l0hooks

torch.set_num_threads(1)
torch.manual_seed(0)

pixels, labels = load_digits(return_X_y=True)
split = train_test_split(pixels / 16, labels, test_size=0.3, stratify=labels, random_state=0)
x, x_test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
y, y_test = (torch.tensor(part) for part in split[2:])


def train(network: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, epochs: int) -> None:
    """An ordinary loop; it knows nothing of gates."""
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(network(images[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(network: nn.Module, images: torch.Tensor) -> float:
    network.eval()
    return (network(images).argmax(1) == y_test).float().mean().item()


# %% [markdown]
# ## A multilayer perceptron, weight by weight
#
# First we train the dense network. It has 6,464 weights.

# %%
mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
train(mlp, torch.optim.Adam(mlp.parameters(), lr=3e-3), x, epochs=25)
mlp_dense = accuracy(mlp, x_test)
print(f"dense: {mlp_dense:.1%} of the test digits right")

# %% [markdown]
# The budget is 10 % of the gates. At every step the expected number of open gates follows a cubic schedule, here for
# 500 steps; then the support is fixed and the weights train on. Which gates stay is decided by the loss: a gate whose
# weight helps rises against the others.

# %%
l0hooks.sparsify(mlp, "weight", budget=l0hooks.Budget(sparsity=0.9, steps=500))
train(mlp, torch.optim.Adam(l0hooks.param_groups(mlp, lr=3e-3, gate_lr=1e-1)), x, epochs=35)
sparse, report = l0hooks.prune(mlp, return_report=True)
mlp_sparse = accuracy(sparse, x_test)
weights = {name: weight for name, weight in sparse.named_parameters() if name.endswith("weight")}
kept = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
for name, weight in weights.items():
    print(f"layer {name[0]}: {kept[name]:4d} of {weight.numel():,} weights stay")
print(f"{1 - sum(kept.values()) / 6464:.1%} zeros, {mlp_sparse:.1%} right")

# %% [markdown]
# `sparse` is a plain `nn.Sequential` with exact zeros. The budget is for all layers together, and the loss
# decides how it is shared. The first layer loses most, because many pixels at the border are always blank.
#
# ## A convolutional network, channel by channel
#
# A channel is written by one layer and read by others. If it goes, all of them get smaller. `channel_groups` says
# what belongs together, and what cannot go.

# %%
images, images_test = x.reshape(-1, 1, 8, 8), x_test.reshape(-1, 1, 8, 8)
cnn = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(32 * 16, 10),
)
train(cnn, torch.optim.Adam(cnn.parameters(), lr=2e-3), images, epochs=8)
cnn_dense = accuracy(cnn, images_test)
print(l0hooks.channel_groups(cnn, (images[:2],)))

# %% [markdown]
# The budget counts parameters of the whole model, biases and norms included. A channel's parameters depend on how
# many channels stay next to it; the budget takes that into account.


# %%
def shrink(sparsity: float) -> nn.Module:
    """A plain network with a share of the parameters removed."""
    torch.manual_seed(0)
    gated = copy.deepcopy(cnn)
    budget = l0hooks.Budget(sparsity=sparsity, unit="params", steps=220)
    l0hooks.sparsify(gated, "coupled", example_inputs=(images[:2],), budget=budget)
    train(gated, torch.optim.Adam(l0hooks.param_groups(gated, lr=2e-3, gate_lr=1e-1)), images, epochs=16)
    return l0hooks.prune(gated.eval(), example_inputs=(images[:8],))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


smaller = {0.0: cnn} | {sparsity: shrink(sparsity) for sparsity in (0.6, 0.8)}
cnn_accuracy = {sparsity: accuracy(network, images_test) for sparsity, network in smaller.items()}
for sparsity, network in smaller.items():
    channels = f"{network[0].out_channels:2d} and {network[3].out_channels:2d} channels"
    print(f"{parameters(network):6,} parameters, {channels}: {cnn_accuracy[sparsity]:.1%} right")

# %% [markdown]
# A fifth of the parameters is left, at a cost of about one digit in a hundred. `smaller[0.8]` needs no sparse
# kernels: its layers are smaller `nn.Conv2d` and `nn.Linear`.

# %%
print(smaller[0.8])

# %% [markdown]
# ## The picture
#
# What the sparse perceptron still reads. Left is the average digit; right, for each pixel, the number of weights that
# still read it (64 in the dense network). Below are the convolutional networks.

# %%
read_by = weights["0.weight"].detach().count_nonzero(0).reshape(8, 8).numpy()
figure = plt.figure(figsize=(6, 5.6))
left, right, below = figure.subplot_mosaic([["left", "right"], ["below", "below"]], height_ratios=(1.35, 1)).values()
for axes, grid, title in (
    (left, x.mean(0).reshape(8, 8).numpy(), "The average digit"),
    (right, read_by, "Weights on a pixel"),
):
    axes.imshow(grid, cmap="cividis")
    axes.set(title=title, xticks=[], yticks=[])
for (row, column), count in np.ndenumerate(read_by):
    colour = "white" if count < read_by.max() / 2 else "black"
    right.text(column, row, str(count), ha="center", va="center", fontsize=9, color=colour)

names = ["dense", "60 % smaller", "80 % smaller"]
sizes = [parameters(network) for network in smaller.values()]
bars = below.barh(names, sizes, color=["0.55", "#0f8b8d", "#0f8b8d"], height=0.6)
below.bar_label(
    bars, [f"{size:,}: {share:.1%} right" for size, share in zip(sizes, cnn_accuracy.values(), strict=True)], padding=4
)
below.invert_yaxis()
below.set(title="Convolutional network: parameters, test accuracy", xlim=(0, 1.45 * max(sizes)), xticks=[])
below.spines[["bottom", "left"]].set_visible(False)
below.tick_params(left=False)
