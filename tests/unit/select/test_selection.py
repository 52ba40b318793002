"""Sample, feature and hybrid gates: exactly k, of every kind of data, and what is refused."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from l0hooks import FeatureGate, HybridGate, SampleGate, penalty, set_temperature
from l0hooks.errors import InvalidValueError, StateError, UnsupportedModuleError

CLASSES = [SampleGate, FeatureGate]
FAMILIES = ["hard_concrete", "straight_through", "stg", "deterministic"]


def scattered(gate, seed=0):
    """``gate`` with different log-odds, and the k largest of them by a full sort."""
    values = torch.randn(gate.n, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        gate.gate.log_alpha.copy_(values)
    return gate, sorted(np.argsort(-values.numpy())[: round(gate.rule.target)].tolist())


def finish(gate):
    for _ in range(int(gate.rule.budget.steps)):
        gate.rule.advance()
    return gate


# --- exactly k -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (2, 2), (7, 1), (7, 6), (7, 7), (1000, 13)])
def test_exactly_k_at_every_step_of_the_schedule_are_the_largest(kind, n, k):
    gate, wanted = scattered(kind(n, k, steps=4, automatic=False)) if k < n else (kind(n, k, steps=4), list(range(n)))
    x = torch.randn(n, n) if n < 100 else torch.randn(n)
    for step in range(6):
        for mode in (True, False):
            selected, indices = gate.train(mode).select(x)
            assert indices.tolist() == wanted
            assert torch.equal(selected, x.index_select(0 if kind is SampleGate else -1, indices))
            assert indices.dtype == torch.int64
            assert torch.equal(gate.final() != 0, gate.chosen())
            if gate.rule.finished:
                assert torch.equal(gate.chosen(), gate.gate.support())
        gate.rule.advance()
        assert gate.rule.step == min(step + 1, 4) or k == n


@pytest.mark.parametrize("kind", CLASSES)
def test_ties_are_resolved_by_the_lowest_index(kind):
    gate = kind(10, 4)
    assert gate.select(torch.arange(10))[1].tolist() == [0, 1, 2, 3]
    with torch.no_grad():
        gate.gate.log_alpha[[3, 7, 9]] += 1
    assert gate.select(torch.arange(10))[1].tolist() == [0, 3, 7, 9]


def test_a_schedule_that_starts_below_k_is_no_trouble():
    gate, wanted = scattered(SampleGate(20, 15, steps=5, init_keep_prob=0.1, automatic=False))
    weights = gate.select_weighted(torch.zeros(20), torch.ones(20))[1]
    assert gate.select(np.arange(20))[1].tolist() == wanted
    assert bool((weights > 0).all())
    assert len(weights) == 15


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CLASSES)
def test_with_k_equal_n_everything_is_multiplied_by_one_and_stays_so(kind, family):
    gate = kind(6, 6, family=family)
    x = torch.randn(6, 6, dtype=torch.float64)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1.0, weight_decay=0.5)
    for _ in range(3):
        for mode in (True, False):
            assert torch.equal(gate.train(mode)(x), x)
        optimizer.zero_grad()
        (gate.train()(x).sum() + penalty(gate, l0=1.0)).backward()
        optimizer.step()
    assert penalty(gate, l0=1.0).item() == gate.rule.expected() == 6
    assert gate.importances().tolist() == [1.0] * 6
    assert torch.equal(gate.select(x)[0], x)
    assert gate.rule.finished


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "counts", [(5, 0), (5, -1), (5, 6), (0, 0), (5, 2.0), (5, True), (5, "2"), (5.0, 2), (5, None)]
)
def test_counts_that_cannot_be(kind, counts):
    with pytest.raises(ValueError, match=kind.__name__):
        kind(*counts)


def test_counts_may_be_numpy_integers():
    assert SampleGate(np.int64(5), np.int32(2)).k == 2


def test_gates_that_are_no_numbers_are_not_ranked():
    gate = SampleGate(4, 2)
    with torch.no_grad():
        gate.gate.log_alpha[1] = torch.nan
    with pytest.raises(StateError, match="NaN cannot be ranked"):
        gate.select(torch.zeros(4))


def test_selecting_samples_nothing_and_changes_nothing():
    gate, _ = scattered(SampleGate(9, 3))
    state, before = torch.get_rng_state(), gate.gate.log_alpha.clone()
    with torch.no_grad():
        one = gate.select(torch.arange(9))
    with torch.inference_mode():
        other = gate.select(torch.arange(9))
    assert torch.equal(one[1], other[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(gate.gate.log_alpha, before)
    assert gate.training
    gate(torch.ones(9)).sum().backward()  # the mask of inference mode does not get in the way


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("kind", CLASSES)
def test_gating_along_any_dimension(kind, dim):
    gate = kind(4, 2, init_mean=0.5)
    x = torch.randn(4, 4, 4).transpose(0, 2)
    torch.manual_seed(1)
    got = gate(x, dim=dim)
    torch.manual_seed(1)
    z = gate.gate()
    assert torch.equal(got, (x.movedim(dim, -1) * z).movedim(-1, dim))
    torch.manual_seed(1)
    assert torch.equal(gate.weights(x[0, 0]), x[0, 0] * z)


def test_each_class_has_its_own_axis():
    x = torch.ones(3, 5)
    assert torch.equal(SampleGate(3, 1).eval()(x)[:, 0] > 0, SampleGate(3, 1).gate.support())
    assert torch.equal(FeatureGate(5, 1).eval()(x)[0] > 0, FeatureGate(5, 1).gate.support())
    assert HybridGate(3, 2)(x).shape == (3, 5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_become_floating_point(dtype):
    gate = FeatureGate(4, 2)
    x = torch.tensor([[1, 0, 1, 1]]).to(dtype)
    assert gate(x).dtype == torch.float32
    assert gate.select(x)[0].dtype == dtype
    assert gate.weights(x[0]).dtype == torch.float32


def test_each_example_has_noise_of_its_own_and_its_probability():
    gate = FeatureGate(3, 1, noise="example", init_keep_prob=0.3)
    z = gate(torch.ones(40_000, 2, 3))
    assert torch.equal(z[:, 0], z[:, 1])
    share = (z[:, 0] > 0).double()
    assert (share.mean(0) - 0.3).abs().max() < 4 * math.sqrt(0.21 / 40_000)
    assert torch.corrcoef(share.T).fill_diagonal_(0).abs().max() < 0.02
    assert len(set(map(tuple, gate.eval()(torch.ones(50, 3)).tolist()))) == 1
    samples = SampleGate(4, 2, noise="example")
    assert samples(torch.ones(5, 4, 2), dim=1).shape == (5, 4, 2)
    with pytest.raises(InvalidValueError, match="needs the examples along the first axis"):
        samples(torch.ones(4, 2))
    with pytest.raises(InvalidValueError, match="did you mean 'example'"):
        FeatureGate(4, 2, noise="examples")


def test_the_penalty_sees_the_gates_and_temperatures_reach_them():
    model = torch.nn.Sequential(FeatureGate(8, 2, init_keep_prob=0.5), torch.nn.Linear(8, 1))
    value = penalty(model, l0=1.0)
    assert value.item() == pytest.approx(4.0, rel=1e-5)
    value.backward()
    assert bool((model[0].gate.log_alpha.grad > 0).all())
    set_temperature(model, 0.3)
    assert model[0].gate.temperature == 0.3


def test_importances_are_keep_probabilities():
    gate, _ = scattered(FeatureGate(6, 2))
    wanted = torch.sigmoid(gate.gate.log_alpha.detach() - 2 / 3 * math.log(0.1 / 1.1))
    torch.testing.assert_close(gate.importances(), wanted)
    assert not gate.importances().requires_grad
    assert finish(gate).importances().sum().item() == pytest.approx(2, rel=1e-5)


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_every_kind_of_data_gives_the_same_selection(kind):
    gate, wanted = scattered(kind(6, 3))
    dense = np.random.default_rng(0).integers(0, 3, (6, 6)).astype(float)
    expected = dense[wanted] if kind is SampleGate else dense[:, wanted]
    for x in (
        torch.from_numpy(dense),
        dense,
        pd.DataFrame(dense),
        *(getattr(sp, f"{name}_array")(dense) for name in ("csr", "csc", "coo", "bsr", "dia", "lil")),
        sp.csr_matrix(dense),
    ):
        selected, indices = gate.select(x)
        assert list(indices) == wanted
        assert isinstance(indices, torch.Tensor if isinstance(x, torch.Tensor) else np.ndarray)
        assert isinstance(selected, (type(x), sp.csr_array))
        assert np.array_equal(selected.toarray() if sp.issparse(selected) else np.asarray(selected), expected)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(5, 5), InvalidValueError, "one item for each gate(.|\n)*6 along axis(.|\n)*got: 5"),
        (np.zeros((7, 7)), InvalidValueError, "got: 7"),
        (pd.DataFrame(), InvalidValueError, "got: 0"),
        (sp.csr_array((0, 0)), InvalidValueError, "got: 0"),
        ([1] * 6, UnsupportedModuleError, "known kind"),
        (torch.eye(6).to_sparse(), UnsupportedModuleError, "must be dense"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", CLASSES)
def test_data_that_do_not_fit(kind, x, error, message):
    gate = kind(6, 3)
    with pytest.raises(error, match=message):
        gate.select(x)
    with pytest.raises(ValueError if not isinstance(x, torch.Tensor) else error):
        gate(x)


def test_gating_wants_tensors_and_weights_one_axis():
    gate = SampleGate(6, 3)
    with pytest.raises(InvalidValueError, match=r"gates multiply tensors(.|\n)*ndarray"):
        gate(np.zeros(6))
    with pytest.raises(InvalidValueError, match=r"one weight(.|\n)*expected: shape \(6,\)"):
        gate.weights(torch.zeros(6, 2))
    with pytest.raises(InvalidValueError, match="one weight for each"):
        gate.weights(torch.zeros(5))
    with pytest.raises(InvalidValueError, match="must have the axis"):
        gate(torch.zeros(6), dim=1)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("preserve", [False, True])
def test_weights_are_those_of_evaluation_and_keep_their_total_when_asked(finished, preserve):
    gate, wanted = scattered(SampleGate(8, 3, steps=2, automatic=False, init_keep_prob=0.6))
    if finished:
        finish(gate)
    w = torch.linspace(1, 4, 8, dtype=torch.float64)
    gated = (gate.gate.final() if finished else gate.gate.value(support=gate.chosen())).detach().double() * w
    expected = gated[wanted] * (w.sum() / gated[wanted].sum() if preserve else 1)
    x = np.arange(8)
    for weights in (w, w.numpy(), pd.Series(w.numpy(), index=list("abcdefgh"))):
        selected, got, indices = gate.select_weighted(x, weights, preserve_total=preserve)
        assert type(got) is type(weights)
        assert selected.tolist() == indices.tolist() == wanted
        np.testing.assert_allclose(np.asarray(got), expected.numpy(), rtol=1e-6)
    assert list(got.index) == [list("abcdefgh")[i] for i in wanted]
    if finished:
        assert torch.equal(gate.eval().weights(w)[wanted], gate.select_weighted(w, w)[1])
    if preserve:
        assert got.sum() == pytest.approx(float(w.sum()), rel=1e-12)


def test_weights_that_do_not_fit():
    gate = SampleGate(4, 2)
    x = np.zeros(4)
    for w in (np.ones(3), np.ones((4, 1)), sp.csr_array(np.ones((4, 1)))):
        with pytest.raises(InvalidValueError, match="weight"):
            gate.select_weighted(x, w)
    for w in (np.zeros(4), np.array([0.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, -3.0, -3.0]), np.full(4, np.nan)):
        with pytest.raises(InvalidValueError, match="positive factor"):
            gate.select_weighted(x, w, preserve_total=True)
    assert gate.select_weighted(x, np.array([0.0, 0.0, 1.0, 1.0]))[1].tolist() == [0, 0]
    assert gate.select_weighted(x, np.array([2, 2, 1, 1]), preserve_total=True)[1].tolist() == [3, 3]


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_in_and_out():
    frame = pd.DataFrame(np.zeros((2, 4)), columns=["a", "b", "c", "d"])
    named, plain = FeatureGate(4, 2, feature_names=frame.columns), FeatureGate(4, 2)
    for gate in (named, plain):
        with torch.no_grad():
            gate.gate.log_alpha[[1, 3]] += 1
        assert list(gate.select(frame)[0].columns) == gate.feature_names_out(frame.columns) == ["b", "d"]
    assert named.feature_names_out() == ["b", "d"]
    assert plain.feature_names_out() == ["x1", "x3"]
    with pytest.raises(InvalidValueError, match=r"columns must be those(.|\n)*got: \['d', 'c', 'b', 'a'\]"):
        named.select(frame[["d", "c", "b", "a"]])
    with pytest.raises(InvalidValueError, match="columns must be those"):
        named.feature_names_out(["a", "b", "c", "e"])
    with pytest.raises(InvalidValueError, match=r"must have a name(.|\n)*expected: 4(.|\n)*got: 3"):
        plain.feature_names_out(["a", "b", "c"])
    with pytest.raises(InvalidValueError, match="must have a name"):
        FeatureGate(4, 2, feature_names=["a"])


# --- hybrid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "share", "gated"),
    [(10, 4, 0.25, 1), (10, 4, 0.5, 2), (10, 5, 0.5, 3), (10, 3, 0.5, 2), (10, 10, 0.3, 3), (10, 4, 1.0, 4)],
)
def test_a_hybrid_has_exactly_k_items_with_the_split_asked_for(n, k, share, gated):
    gate, wanted = scattered(HybridGate(n, k, share, 1 - share))
    assert (gate.n_gated, gate.n_random, gate.k) == (gated, k - gated, k)
    for seed in range(20):
        x = torch.randn(n, 2)
        selected, indices, origin = gate.select(x, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(selected, x[indices])
        assert indices.tolist() == sorted(set(indices.tolist()))
        assert len(indices) == len(origin) == k
        assert indices[torch.from_numpy(origin == "gated")].tolist() == wanted
        assert (origin == "random").sum() == k - gated


def test_the_random_part_is_reproducible_and_uniform_among_the_rest():
    gate, wanted = scattered(HybridGate(8, 4, 0.5, 0.5))
    x, generator = np.arange(8), torch.Generator().manual_seed(0)
    first = gate.select(x, generator=torch.Generator().manual_seed(0))[1]
    assert np.array_equal(gate.select(x, generator=generator)[1], first)
    counts = np.zeros(8)
    for _ in range(3000):
        counts[gate.select(x, generator=generator)[1]] += 1
    assert (counts[wanted] == 3000).all()
    rest = np.delete(counts, wanted)
    assert np.abs(rest / 3000 - 2 / 6).max() < 4 * math.sqrt(2 / 9 / 3000)
    torch.manual_seed(4)
    one = gate.select(x)[1]
    torch.manual_seed(4)
    assert np.array_equal(gate.select(x)[1], one)


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_weights_of_random_items_stand_for_all_that_is_not_gated(preserve, share):
    gate, wanted = scattered(HybridGate(9, 4, share, 1 - share, steps=1, automatic=False))
    finish(gate)
    w = np.linspace(1, 3, 9)
    _, weights, indices, origin = gate.select_weighted(
        w, w, preserve_total=preserve, generator=torch.Generator().manual_seed(0)
    )
    z = gate.gate.final().numpy()
    random = origin == "random"
    expected = np.where(random, w[indices], w[indices] * z[indices])
    if preserve:
        part = random if random.any() else ~random
        expected[part] *= (w.sum() - expected[~part].sum()) / expected[part].sum()
        assert weights.sum() == pytest.approx(w.sum())
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert indices[~random].tolist() == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 0.5, 0.4), "sum to 1"),
        ((10, 4, 0.7, 0.7), "sum to 1"),
        ((10, 4, -0.5, 1.5), "sum to 1"),
        ((10, 4, float("nan"), 0.5), "sum to 1"),
        ((10, 4, 0.0, 1.0), "at least one item must be gated"),
        ((10, 4, 0.1, 0.9), "at least one item must be gated"),
        ((10, 11, 0.5, 0.5), "1 <= k <= 10"),
        ((10, 0, 0.5, 0.5), "1 <= k <= 10"),
    ],
    ids=str,
)
def test_hybrids_that_cannot_be(arguments, message):
    with pytest.raises(InvalidValueError, match=message):
        HybridGate(*arguments)


@pytest.mark.parametrize("make", [lambda: SampleGate(4, 2), lambda: FeatureGate(4, 2), lambda: HybridGate(4, 2)])
def test_they_print_their_counts(make):
    assert "4, k=2" in repr(make())


@pytest.mark.parametrize(("k", "other"), [(4, 2), (2, 4), (2, 3)])
def test_the_state_of_a_gate_for_another_k_is_refused(k, other):
    gate, before = SampleGate(4, k), SampleGate(4, k).state_dict()
    with pytest.raises(InvalidValueError, match=rf"counts must agree(.|\n)*n=4, k={k}(.|\n)*n=4, k={other}"):
        gate.load_state_dict(scattered(SampleGate(4, other))[0].state_dict())
    assert torch.equal(gate.state_dict()["gate.log_alpha"], before["gate.log_alpha"])
    gate.load_state_dict(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    gate = HybridGate(50, 10, steps=3).cuda()
    x = torch.randn(50, 2, device="cuda")
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(4):
        gate(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    selected, indices, _ = gate.select(x)
    assert indices.is_cuda
    assert torch.equal(selected, x[indices])
    assert len(gate.select(x.cpu())[1]) == len(indices) == 10
    assert gate.select_weighted(x, torch.ones(50, device="cuda"), preserve_total=True)[1].sum().item() == pytest.approx(
        50
    )
