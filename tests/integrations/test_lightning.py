"""Lightning's Trainer with gates: closures, its log, checkpoints and folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parameters import slow
from torch import Tensor, nn
from torch.utils.data import DataLoader

import l0hooks
from l0hooks.errors import L0HooksWarning, StateError

pytest.importorskip("lightning")
from lightning import pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from l0hooks.integrations.lightning import SparsifyCallback

STEPS = 6
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # lightning's own use of torch
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.rank_zero.LightningDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists and is not empty"),
]


class Module(pl.LightningModule):
    def __init__(self, spec: Any = "weight", budget: l0hooks.Budget | None = None, decay: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        l0hooks.sparsify(self.net, spec, budget=budget, example_inputs=(torch.randn(2, 8),))
        self.decay = decay

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(l0hooks.param_groups(self, lr=1e-3, gate_lr=0.1, weight_decay=self.decay))


def loader() -> DataLoader[Tensor]:
    return DataLoader(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), batch_size=4)


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    given = {"max_steps": 9, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1}
    given |= {"enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **given | options)


class Spy(Callback):
    """The log-odds and supports after every step."""

    def __init__(self) -> None:
        self.history: list[tuple[int, Tensor, Tensor]] = []
        self.wrapped = ""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.wrapped = type(trainer.strategy.model).__name__
        gates = [gate for _, gate in l0hooks.iter_gates(pl_module)]
        odds = torch.cat([gate.log_alpha.detach().flatten() for gate in gates])
        self.history.append((gates[0].rule.step, odds, torch.cat([gate.support().flatten() for gate in gates])))


OPTIONS = [
    *({}, {"accumulate_grad_batches": 2}),
    *slow([{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}, {"precision": "bf16-true"}]),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_budget_runs_to_its_end_and_its_support_stays(tmp_path: Path, options: dict[str, Any]) -> None:
    module, spy = Module(budget=l0hooks.Budget(sparsity=0.75, steps=STEPS)), Spy()
    callback = SparsifyCallback(part="net")
    trainer_of(tmp_path, callback, spy, **options).fit(module, loader())
    each = options.get("accumulate_grad_batches", 1)
    history = spy.history[each - 1 :: each]
    assert [step for step, _, _ in history] == [1, 2, 3, 4, 5, 6, 6, 6, 6]
    for _, odds, support in history[STEPS:]:  # a closure computes gradients after the hook: momentum must not move them
        assert torch.equal(odds, history[STEPS - 1][1])
        assert torch.equal(support, history[STEPS - 1][2])
    assert int(history[-1][2].sum()) == 192 // 4
    assert isinstance(callback.pruned, nn.Sequential)
    assert sum(int(layer.weight.count_nonzero()) for layer in callback.pruned[::2]) <= 192 // 4
    dtype = callback.pruned[0].weight.dtype
    factory = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)  # noqa: E731
    again = l0hooks.load_pruned(factory, tmp_path / "pruned.safetensors")
    x = torch.randn(3, 8, dtype=dtype)
    assert torch.equal(again.eval()(x), callback.pruned(x))


def trained(*, closure: bool) -> dict[str, Tensor]:
    net = Module(budget=l0hooks.Budget(sparsity=0.75, steps=STEPS)).net
    optimizer = torch.optim.AdamW(l0hooks.param_groups(net, lr=1e-3, gate_lr=0.1))
    torch.manual_seed(1)

    def work() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net(torch.randn(2, 8)).square().mean()
        loss.backward()
        return loss

    for _ in range(STEPS + 3):
        if closure:
            assert optimizer.step(work) is not None
        else:
            work()
            optimizer.step()
    return net.state_dict()


def test_a_closure_gives_the_gradients_that_a_plain_step_has() -> None:
    plain, closed = trained(closure=False), trained(closure=True)
    for key in plain:
        torch.testing.assert_close(plain[key], closed[key], atol=0, rtol=0, msg=key)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_penalty_counts_once_a_step_and_is_logged_with_the_sizes(tmp_path: Path, accumulate: int) -> None:
    module = Module(decay=0.0)
    expected = l0hooks.penalty(module, l0=0.5).item()
    before = [gate.log_alpha.detach().clone() for _, gate in l0hooks.iter_gates(module)]
    callback = SparsifyCallback(penalties={"l0": 0.5}, filename=None)
    seen: list[Tensor] = []

    class Gradients(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.extend(
                gate.log_alpha.grad.clone()
                for _, gate in l0hooks.iter_gates(pl_module)
                if gate.log_alpha.grad is not None
            )

    trainer = trainer_of(
        tmp_path, callback, Gradients(), max_steps=2, accumulate_grad_batches=accumulate, logger=CSVLogger(tmp_path)
    )
    trainer.fit(module, loader())
    for grad, odds in zip(seen, before, strict=False):
        keep = torch.sigmoid(odds + 2 / 3 * torch.tensor(11.0).log())
        torch.testing.assert_close(grad.mean(), (0.5 * keep * (1 - keep)).mean(), rtol=0.1, atol=0.0)
    assert len(seen) >= 2
    lines = (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert {"l0_expected_sparsity", "l0_sparsity", "l0_penalty"} <= set(lines[0].split(","))
    logged = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert float(logged["l0_penalty"]) == pytest.approx(expected)
    assert isinstance(callback.pruned, pl.LightningModule)
    assert not list(l0hooks.iter_gates(callback.pruned))


def test_a_checkpoint_of_the_trainer_continues_the_budget(tmp_path: Path) -> None:
    ends = []
    for resume in (False, True):
        module, spy = Module(budget=l0hooks.Budget(sparsity=0.75, steps=STEPS)), Spy()
        saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1, filename="{step}")
        callback = SparsifyCallback(part="net")
        torch.manual_seed(1)
        trainer = trainer_of(tmp_path, callback, spy, saver, enable_checkpointing=True, max_steps=8)
        path = str(tmp_path / "saved" / "step=4.ckpt") if resume else None
        trainer.fit(module, loader(), ckpt_path=path)
        assert [step for step, _, _ in spy.history] == ([5, 6, 6, 6] if resume else [1, 2, 3, 4, 5, 6, 6, 6])
        assert (tmp_path / "saved" / "pruned.safetensors").exists()
        ends.append(l0hooks.summary(module))
    assert ends[0].sparsity == ends[1].sparsity == 0.75


def test_coupled_gates_are_cut(tmp_path: Path) -> None:
    module = Module("coupled", budget=l0hooks.Budget(keep=6, steps=STEPS))
    callback = SparsifyCallback(part="net", example_inputs=(torch.randn(2, 8),))
    trainer_of(tmp_path, callback).fit(module, loader())
    assert callback.pruned[0].weight.shape == (6, 8)


def test_gates_that_decay_are_refused(tmp_path: Path) -> None:
    module = Module()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), weight_decay=0.1)  # type: ignore[method-assign]
    with pytest.raises(StateError, match=r"must have no weight decay(?s:.)*param_groups"):
        trainer_of(tmp_path, SparsifyCallback()).fit(module, loader())


def test_training_that_is_too_short_for_a_budget_says_so_when_it_begins_and_when_it_ends(tmp_path: Path) -> None:
    module = Module(budget=l0hooks.Budget(keep=48, steps=STEPS))
    with pytest.warns(L0HooksWarning) as caught:
        trainer_of(tmp_path, SparsifyCallback(part="net"), max_steps=3).fit(module, loader())
    begin, end = (str(one.message) for one in caught if issubclass(one.category, L0HooksWarning))
    assert "48 gates after 6 steps" in begin
    assert "3 steps of training" in begin
    assert end.startswith("prune: the schedule of a budget has not ended.\n  expected: 48 gates after 6 steps")
    assert "gates at step 3" in end
