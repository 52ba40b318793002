"""The callback for the ``Trainer`` of Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from l0hooks.errors import import_extra
from l0hooks.integrations.common import (
    Penalties,
    add_penalties,
    check_optimizers,
    pruned_and_saved,
    sizes,
    warn_at_the_end,
    warn_if_too_short,
)
from l0hooks.structure.example_inputs import ExampleInputs

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
else:
    _package = import_extra("lightning.pytorch", extra="lightning", where="l0hooks.integrations.lightning")
    Callback, ModelCheckpoint = _package.Callback, _package.callbacks.ModelCheckpoint


class SparsifyCallback(Callback):
    """Train a gated module: add penalties, log sizes, and prune at the end.

    ``configure_optimizers`` of the module must use ``l0hooks.param_groups(self, lr=…, gate_lr=…)``; weight decay on
    gates is an error. Budgets need no further setup: they count the optimiser's steps, and a checkpoint of the trainer
    holds their state.

    Parameters
    ----------
    penalties : mapping, optional
        Keywords of :func:`l0hooks.penalty`: ``{"l0": 1e-3}``. The gradient is added before clipping, once for each
        step of the optimiser, also if batches are accumulated. The value is logged apart from the loss.
    example_inputs : sequence or mapping, optional
        Arguments of the pruned part, for :func:`l0hooks.prune`; needed for coupled gates.
    part : str
        Name of the module to prune, the one passed to ``sparsify``; "" for the LightningModule itself.
    filename : str or None
        File name of the pruned model in the folder of checkpoints (without one: ``default_root_dir``); None to not
        save it.

    Attributes
    ----------
    pruned : nn.Module or None
        The plain model after training, in the process of rank 0.

    Raises
    ------
    MissingExtraError
        On import, if lightning is not installed.

    Examples
    --------
    ``Trainer(callbacks=[callback])`` with

    >>> callback = SparsifyCallback(penalties={"l0": 1e-3})
    >>> callback.pruned is None
    True
    """

    def __init__(
        self,
        *,
        penalties: Penalties | None = None,
        example_inputs: ExampleInputs | None = None,
        part: str = "",
        filename: str | None = "pruned.safetensors",
    ) -> None:
        self.penalties = dict(penalties or {})
        self.example_inputs = example_inputs
        self.part = part
        self.filename = filename
        self.pruned: nn.Module | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the optimisers hold the gates, without weight decay, and that schedules can end."""
        self.pruned = None
        check_optimizers(pl_module, trainer.optimizers, "l0hooks.param_groups(self, lr=..., gate_lr=...)")
        if len(trainer.optimizers) == 1:  # the trainer counts the steps of all together
            warn_if_too_short(pl_module, trainer.estimated_stepping_batches - trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalties' gradient, after the gradients are unscaled."""
        if self.penalties:
            pl_module.log("l0_penalty", add_penalties(pl_module, self.penalties))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the sizes whenever the trainer logs."""
        if trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:  # type: ignore[attr-defined]  # has no type
            pl_module.log_dict(sizes(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, and save the result beside the trainer's checkpoints."""
        if trainer.is_global_zero:
            saver = trainer.checkpoint_callback
            folder = saver.dirpath if isinstance(saver, ModelCheckpoint) else None
            path = None if self.filename is None else Path(folder or trainer.default_root_dir) / self.filename
            self.pruned = pruned_and_saved(pl_module.get_submodule(self.part), self.example_inputs, path)
        else:
            warn_at_the_end(pl_module)
