"""The laws that every gate over items keeps, as an abstract test case. A subclass writes how a gate is made."""

import abc
import copy
import math
import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from l0hooks import penalty, set_temperature
from l0hooks.errors import InvalidValueError, L0HooksWarning, StateError, UnsupportedModuleError

FAMILIES = ["hard_concrete", "straight_through", "stg", "deterministic"]


def scattered(gate, seed=0):
    """``gate`` with different log-odds, and the largest of them by a full sort."""
    values = torch.randn(gate.n, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        gate.gate.log_alpha.copy_(values)
    return gate, sorted(np.argsort(-values.numpy())[: round(gate.rule.target)].tolist())


def finish(gate):
    for _ in range(int(gate.rule.budget.steps)):
        gate.rule.advance()
    return gate


def train(gate, steps):
    """Adam on a fixed loss; every call begins with the same noise."""
    torch.manual_seed(7)
    target = torch.linspace(-1, 1, gate.n)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        gate.weights(target).sum().backward()
        optimizer.step()
    return gate


class ItemGateLaws(abc.ABC):
    """What holds for every gate over items: exactly k, chosen without sampling, from every kind of data."""

    axis: int

    @abc.abstractmethod
    def make(self, n, k, **options):
        """A gate over n items whose log-odds choose k."""

    def gated(self, k):
        """How many of k items the gates choose."""
        return k

    def learned(self, gate, indices):
        """Those of the selected indices that the gates have chosen."""
        return list(indices)

    def select(self, gate, x):
        """The items of ``x`` that are selected, and their indices."""
        return gate.select(x)[:2]

    @pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (2, 2), (7, 1), (7, 6), (7, 7), (1000, 13)])
    def test_exactly_k_at_every_step_of_the_schedule_are_the_largest(self, n, k):
        gate, wanted = self.make(n, k, steps=4, automatic=False), list(range(n))
        if not gate.rule.finished:
            gate, wanted = scattered(gate)
        x = torch.randn(n, n) if n < 100 else torch.randn(n)
        for step in range(6):
            for mode in (True, False):
                selected, indices = self.select(gate.train(mode), x)
                assert self.learned(gate, indices.tolist()) == wanted
                assert indices.tolist() == sorted(set(indices.tolist()))
                assert len(indices) == gate.k == k
                assert torch.equal(selected, x.index_select(self.axis, indices))
                assert indices.dtype == torch.int64
                assert gate.chosen().sum() == gate.rule.target == self.gated(k)
                assert torch.equal(gate.final() != 0, gate.chosen())
                if gate.rule.finished:
                    assert torch.equal(gate.chosen(), gate.gate.support())
            gate.rule.advance()
            assert gate.rule.step == min(step + 1, 4) or k == n

    def test_exactly_k_while_it_is_trained(self):
        gate = self.make(12, 4, steps=5, init_keep_prob=0.5)
        for _ in range(8):
            train(gate, 1)
            assert len(self.select(gate, np.arange(12))[1]) == 4
            assert gate.rule.expected() == pytest.approx(gate.rule.scheduled, rel=1e-4)
        assert gate.rule.finished

    def test_ties_are_resolved_by_the_lowest_index(self):
        gate, gated = self.make(10, 4), self.gated(4)
        with pytest.warns(L0HooksWarning, match=f"got: 10 gates that are equal, of which {gated} stay"):
            assert self.learned(gate, self.select(gate, torch.arange(10))[1].tolist()) == [0, 1, 2, 3][:gated]
        with torch.no_grad():
            gate.gate.log_alpha[[3, 7, 9]] += 1
        wanted = sorted([3, 7, 9, 0][:gated])
        with pytest.warns(L0HooksWarning, match=f"{7 if gated > 3 else 3} gates that are equal"):
            assert self.learned(gate, self.select(gate, torch.arange(10))[1].tolist()) == wanted
        with torch.no_grad():
            gate.gate.log_alpha[[7, 8]] += 2  # ties elsewhere decide nothing
            gate.gate.log_alpha[[9, 8]] += 1
        assert len(self.select(gate, torch.arange(10))[1]) == 4

    @pytest.mark.parametrize(
        "counts", [(5, 0), (5, -1), (5, 6), (0, 0), (5, 2.0), (5, True), (5, "2"), (5.0, 2), (5, None)]
    )
    def test_invalid_counts_are_refused(self, counts):
        with pytest.raises(InvalidValueError, match=type(self.make(2, 1)).__name__):
            self.make(*counts)

    def test_counts_may_be_numpy_integers(self):
        assert self.make(np.int64(5), np.int32(2)).k == 2

    def test_gates_that_are_nan_are_not_ranked(self):
        gate = self.make(4, 2)
        with torch.no_grad():
            gate.gate.log_alpha[1] = torch.nan
        with pytest.raises(StateError, match="NaN cannot be ranked"):
            self.select(gate, torch.zeros(4))

    def test_selecting_samples_no_gates_and_changes_nothing(self):
        gate, wanted = scattered(self.make(9, 3))
        before = gate.gate.log_alpha.clone()
        with torch.no_grad():
            one = self.select(gate, torch.arange(9))
        with torch.inference_mode():
            other = self.select(gate, torch.arange(9))
        assert self.learned(gate, one[1].tolist()) == self.learned(gate, other[1].tolist()) == wanted
        assert torch.equal(gate.gate.log_alpha, before)
        assert gate.training
        gate(torch.ones(9)).sum().backward()  # a mask made in inference mode does not prevent training

    @pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
    def test_gating_along_any_dimension(self, dim):
        gate = self.make(4, 2, init_mean=0.5)
        x = torch.randn(4, 4, 4).transpose(0, 2)
        torch.manual_seed(1)
        got = gate(x, dim=dim)
        torch.manual_seed(1)
        z = gate.gate()
        assert torch.equal(got, (x.movedim(dim, -1) * z).movedim(-1, dim))
        torch.manual_seed(1)
        assert torch.equal(gate.weights(x[0, 0]), x[0, 0] * z)

    def test_gating_without_a_dimension_is_along_its_own_axis(self):
        gate = self.make(4, 2, init_mean=0.5)
        x = torch.randn(4, 4, 4)
        torch.manual_seed(1)
        got = gate(x)
        torch.manual_seed(1)
        assert torch.equal(got, gate(x, dim=self.axis))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
    def test_integers_become_floating_point(self, dtype):
        gate = self.make(4, 2)
        with torch.no_grad():
            gate.gate.log_alpha += torch.arange(4)
        x = torch.ones(4, 4).to(dtype)
        assert gate(x).dtype == torch.float32
        assert self.select(gate, x)[0].dtype == dtype
        assert gate.weights(x[0]).dtype == torch.float32

    def test_each_example_has_its_own_noise_where_examples_come_first(self):
        gate = self.make(3, 1, noise="example", init_keep_prob=0.3)
        z = gate(torch.ones(40_000, 2, 3), dim=2)
        assert torch.equal(z[:, 0], z[:, 1])
        share = (z[:, 0] > 0).double()
        assert (share.mean(0) - 0.3).abs().max() < 4 * math.sqrt(0.21 / 40_000)
        assert torch.corrcoef(share.T).fill_diagonal_(0).abs().max() < 0.02
        assert len(set(map(tuple, gate.eval()(torch.ones(50, 3), dim=1).tolist()))) == 1
        with pytest.raises(InvalidValueError, match="needs the examples along the first axis"):
            gate.train()(torch.ones(3, 2), dim=0)
        with pytest.raises(InvalidValueError, match="did you mean 'example'"):
            self.make(4, 2, noise="examples")

    def test_penalties_and_temperatures_include_the_gates(self):
        gate = self.make(8, 2, init_keep_prob=0.5)
        value = penalty(torch.nn.Sequential(gate), l0=1.0)
        assert value.item() == pytest.approx(4.0, rel=1e-5)
        value.backward()
        assert bool((gate.gate.log_alpha.grad > 0).all())
        set_temperature(gate, 0.3)
        assert gate.gate.temperature == 0.3

    def test_importances_are_keep_probabilities(self):
        gate, _ = scattered(self.make(6, 2))
        wanted = torch.sigmoid(gate.gate.log_alpha.detach() - 2 / 3 * math.log(0.1 / 1.1))
        torch.testing.assert_close(gate.importances(), wanted)
        assert not gate.importances().requires_grad
        assert finish(gate).importances().sum().item() == pytest.approx(gate.rule.target, rel=1e-5)

    def test_a_saved_run_goes_on_bit_for_bit_where_its_state_is_loaded(self):
        gate, again = (self.make(10, 3, steps=6, init_keep_prob=0.5) for _ in range(2))
        again.load_state_dict(train(gate, 3).state_dict())
        assert again.rule.step == 3
        train(gate, 5)
        train(again, 5)
        assert torch.equal(again.gate.log_alpha, gate.gate.log_alpha)
        assert torch.equal(again.chosen(), gate.chosen())
        assert again.rule.finished

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda gate: pickle.loads(pickle.dumps(gate))])
    def test_a_copy_trains_on_and_leaves_the_original_alone(self, copied):
        gate = train(self.make(10, 3, steps=6, init_keep_prob=0.5), 3)
        again = copied(gate)
        assert torch.equal(again.gate.log_alpha, gate.gate.log_alpha)
        train(again, 5)
        assert (gate.rule.step, again.rule.step) == (3, 6)
        train(gate, 5)
        torch.testing.assert_close(again.gate.log_alpha, gate.gate.log_alpha, rtol=1e-5, atol=1e-5)
        assert torch.equal(again.chosen(), gate.chosen())

    def test_the_state_of_a_gate_for_another_k_is_refused_and_nothing_is_loaded(self):
        for own, n, k in ((2, 4, 3), (2, 4, 4), (4, 4, 2), (2, 5, 2)):
            gate = self.make(4, own)
            before = {name: torch.clone(value) for name, value in gate.state_dict().items()}
            other = scattered(self.make(n, k))[0].state_dict()
            with pytest.raises(InvalidValueError, match=rf"counts must agree(.|\n)*n=4, k={own}(.|\n)*n={n}, k={k}"):
                gate.load_state_dict(other)
            assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())
            gate.load_state_dict(before)

    def test_it_prints_its_counts(self):
        assert "4, k=2" in repr(self.make(4, 2))

    def test_every_kind_of_data_gives_the_same_selection(self):
        gate, wanted = scattered(self.make(6, 3))
        dense = np.random.default_rng(0).integers(0, 3, (6, 6)).astype(float)
        for x in (
            torch.from_numpy(dense),
            dense,
            pd.DataFrame(dense),
            *(getattr(sp, f"{name}_array")(dense) for name in ("csr", "csc", "coo", "bsr", "dia", "lil")),
            sp.csr_matrix(dense),
        ):
            selected, indices = self.select(gate, x)
            assert self.learned(gate, indices.tolist()) == wanted
            assert isinstance(indices, torch.Tensor if isinstance(x, torch.Tensor) else np.ndarray)
            assert isinstance(selected, (type(x), sp.csr_array))
            found = selected.toarray() if sp.issparse(selected) else np.asarray(selected)
            assert np.array_equal(found, np.take(dense, np.asarray(indices), self.axis))

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
    def test_data_that_do_not_fit(self, x, error, message):
        gate = self.make(6, 3)
        with pytest.raises(error, match=message):
            gate.select(x)
        with pytest.raises(ValueError if not isinstance(x, torch.Tensor) else error):
            gate(x)

    def test_gating_needs_tensors_and_weights_need_one_axis(self):
        gate = self.make(6, 3)
        with pytest.raises(InvalidValueError, match=r"gates multiply tensors(.|\n)*ndarray"):
            gate(np.zeros(6))
        with pytest.raises(InvalidValueError, match=r"one weight(.|\n)*expected: shape \(6,\)"):
            gate.weights(torch.zeros(6, 2))
        with pytest.raises(InvalidValueError, match="one weight for each"):
            gate.weights(torch.zeros(5))
        with pytest.raises(InvalidValueError, match="must have the axis"):
            gate(torch.zeros(6), dim=1)


class AllGatedLaws(ItemGateLaws):
    """What holds where the gates choose all k items, and none is random."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_with_k_equal_n_everything_is_multiplied_by_one_and_stays_so(self, family):
        gate = self.make(6, 6, family=family)
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
        assert torch.equal(self.select(gate, x)[0], x)
        assert gate.rule.finished

    def test_selecting_draws_nothing(self):
        gate, state = scattered(self.make(9, 3))[0], torch.get_rng_state()
        one, other = (gate.select(torch.arange(9)) for _ in range(2))
        assert torch.equal(one[1], other[1])
        assert torch.equal(torch.get_rng_state(), state)
