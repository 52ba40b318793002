# %% [markdown]
# # Feature selection
#
# A doctor can take five measurements, not thirty. Which five? L0 answers the question at the size that it asks for:
# exactly $k$ features, none of them shrunk. There are three ways, from the most general to the fastest:
#
# | | the model that uses the features | how |
# | --- | --- | --- |
# | `FeatureGate` | any torch module | gates, trained with it |
# | `L0FeatureSelector` | any scikit-learn estimator after it | gates in front of small networks, or the linear search |
# | `L0Classifier`, `L0Regressor` | linear | a search over subsets |

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LinearRegression, LogisticRegression, lasso_path
from sklearn.metrics import log_loss, r2_score
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.svm import SVC
from torch import nn
from torch.nn import functional as F

import l0hooks
from l0hooks.sklearn import L0Classifier, L0FeatureSelector, L0Regressor

torch.set_num_threads(1)

# %% [markdown]
# ## Any torch module
#
# Breast cancer data: 569 tumours, 30 measurements, benign or malignant. A `FeatureGate` is one more layer in front of
# a small network. While it trains, the expected number of open gates falls from 30 to 5; then exactly five are fixed
# and the network trains on with those. `noise="example"` draws a mask for each tumour, so that the gates learn more
# in a step than from one mask for all.

# %%
frame, benign = load_breast_cancer(return_X_y=True, as_frame=True)
train, test, y_train, y_test = train_test_split(frame, benign, test_size=0.3, stratify=benign, random_state=0)
scaler = StandardScaler().fit(train)
x_train, x_test = (torch.tensor(scaler.transform(part), dtype=torch.float32) for part in (train, test))
t_train, t_test = (torch.tensor(part.to_numpy(), dtype=torch.float32) for part in (y_train, y_test))


def fit(network: nn.Module, steps: int = 600) -> float:
    """Train on all of the training data, and return the share of the test tumours told right."""
    optimizer = torch.optim.Adam(l0hooks.param_groups(network, lr=5e-3, gate_lr=5e-2, weight_decay=1e-3))
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(network(x_train).squeeze(1), t_train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        return ((network(x_test).squeeze(1) > 0) == (t_test > 0.5)).float().mean().item()


def network(*first: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*first, nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 1))


gate = l0hooks.FeatureGate(30, k=5, steps=360, noise="example", init_keep_prob=0.5, feature_names=list(frame.columns))
with_five, with_all = fit(network(gate)), fit(network())
chosen = gate.feature_names_out()
print("chosen:", ", ".join(chosen))
print(f"right: {with_five:.1%} with five measurements, {with_all:.1%} with thirty")

# %% [markdown]
# `gate.select(data)` takes these columns out of tensors, arrays, data frames and sparse matrices.
#
# ## In a pipeline
#
# `L0FeatureSelector` is a scikit-learn selector. With `estimator="linear"` it takes the best features of a logistic
# regression, with `"mlp"` (the default) those that small networks need, whatever estimator comes after it.

# %%
pipeline = make_pipeline(StandardScaler(), L0FeatureSelector(5, "linear", random_state=0), SVC())
pipeline.set_output(transform="pandas").fit(train, y_train)
in_pipeline = pipeline.score(test, y_test)
print("chosen:", ", ".join(pipeline[:-1].get_feature_names_out()))
print(f"right: {in_pipeline:.1%} with an SVC on five measurements")

# %% [markdown]
# ## Linear models: against the lasso path
#
# The usual way to few features is an L1 penalty. It selects *and* shrinks,
#
# $$\min_\beta\ \text{loss}(\beta) + \lambda \sum_j |\beta_j|,$$
#
# so a price high enough to leave five features pulls those five towards zero as well. L0 penalises the presence of a
# coefficient, not its size. We compare both at equal numbers of features, on held-out tumours: for each $k$, the
# weakest L1 penalty that leaves at most $k$.

# %%
counts = [1, 2, 3, 4, 5, 6, 8, 10, 14]
strengths = np.geomspace(0.005, 1.0, 40)  # of L1, from strong to weak: scikit-learn's C


def by_count(models: list[LogisticRegression], k: int) -> LogisticRegression:
    """The last, weakest penalised of the models with at most k features."""
    return [model for model in models if np.count_nonzero(model.coef_) <= k][-1]


losses = {"L0": np.empty((5, len(counts))), "L1": np.empty((5, len(counts)))}
x, y = frame.to_numpy(), benign.to_numpy()
for fold, (fit_on, rest) in enumerate(StratifiedKFold(5, shuffle=True, random_state=0).split(x, y)):
    scaler = StandardScaler().fit(x[fit_on])
    seen, held_out = scaler.transform(x[fit_on]), scaler.transform(x[rest])
    path = [
        LogisticRegression(C=strength, l1_ratio=1.0, solver="liblinear", random_state=0).fit(seen, y[fit_on])
        for strength in strengths
    ]
    for column, k in enumerate(counts):
        best = {"L0": L0Classifier(k=k).fit(seen, y[fit_on]), "L1": by_count(path, k)}
        for name, model in best.items():
            losses[name][fold, column] = log_loss(y[rest], model.predict_proba(held_out))
print("measurements " + " ".join(f"{k:5d}" for k in counts))
for name, loss in losses.items():
    print(f"log loss, {name} " + " ".join(f"{value:5.3f}" for value in loss.mean(0)))

# %% [markdown]
# With few measurements L0 predicts far better. With many it does not: past the point where every useful measurement
# is in, the shrinkage of L1 is worth more than the choice, and its path goes on to improve while L0's gets worse.
#
# ## Regression, with many more candidates
#
# Diabetes: ten measurements, their squares and products, 65 candidates that are all related. The lasso's choice can
# also be refitted without the penalty ("relaxed"), which removes the shrinkage and keeps the choice.

# %%
measurements, progression = load_diabetes(return_X_y=True)
candidates = PolynomialFeatures(2, include_bias=False).fit_transform(measurements)
terms = [2, 3, 4, 5, 6, 8, 10, 12, 15]
scores = {name: np.empty((10, len(terms))) for name in ("L0", "lasso", "lasso, refitted")}
folds = [pair for seed in (0, 1) for pair in KFold(5, shuffle=True, random_state=seed).split(candidates)]
for fold, (fit_on, rest) in enumerate(folds):
    scaler = StandardScaler().fit(candidates[fit_on])
    seen, held_out = scaler.transform(candidates[fit_on]), scaler.transform(candidates[rest])
    centre = progression[fit_on].mean()
    target = progression[fit_on] - centre
    _, coefficients, _ = lasso_path(seen, target, alphas=np.geomspace(48, 0.1, 200))
    for column, k in enumerate(terms):
        lasso = coefficients[:, np.flatnonzero(np.count_nonzero(coefficients, axis=0) <= k)[-1]]
        support = np.flatnonzero(lasso)
        refitted = LinearRegression().fit(seen[:, support], target)
        predictions = {
            "L0": L0Regressor(k=k).fit(seen, target).predict(held_out),
            "lasso": held_out @ lasso,
            "lasso, refitted": refitted.predict(held_out[:, support]),
        }
        for name, prediction in predictions.items():
            scores[name][fold, column] = r2_score(progression[rest], prediction + centre)
print("terms               " + " ".join(f"{k:5d}" for k in terms))
for name, score in scores.items():
    print(f"R², {name:15} " + " ".join(f"{value:5.3f}" for value in score.mean(0)))

# %% [markdown]
# With six terms L0 is as good as the lasso with twelve, with eight as good as that with fifteen. Past eight it gets
# worse and the lasso better: with fifteen terms each, the lasso wins. Against the *refitted* lasso L0 has no
# advantage here: the choices are about equally good, and what made the lasso worse was its shrinkage.
#
# ## The picture

# %%
colours = {"L0": "#0f8b8d", "L1": "#e08214", "lasso": "#e08214", "lasso, refitted": "#8073ac"}
styles = {"L0": "o-", "L1": "s--", "lasso": "s--", "lasso, refitted": "^:"}
figure, (above, below) = plt.subplots(2, figsize=(6, 6))
for axes, sizes, values in ((above, counts, losses), (below, terms, scores)):
    for name, value in values.items():
        mean, error = value.mean(0), value.std(0, ddof=1) / np.sqrt(len(value))
        axes.plot(sizes, mean, styles[name], color=colours[name], label=name)
        axes.fill_between(sizes, mean - error, mean + error, color=colours[name], alpha=0.15, linewidth=0)
    axes.grid()
    axes.legend()
above.set(
    title="Breast cancer: lower is better", xlabel="measurements used", ylabel="held-out log loss", ylim=(0, None)
)
below.set(title="Diabetes: higher is better", xlabel="terms used, of 65", ylabel="held-out R²", ylim=(0.15, None))
