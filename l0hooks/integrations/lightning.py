"""Gates under the ``Trainer`` of Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from l0hooks.errors import import_extra
from l0hooks.integrations.common import Penalties, add_penalties, check_optimizers, pruned_and_saved, sizes

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = import_extra("lightning.pytorch", extra="lightning", where="l0hooks.integrations.lightning").Callback


class SparsifyCallback(Callback):
    """Trains a module that was given gates: penalties, log, and the pruned model at the end.

    The module's ``configure_optimizers`` says how the gates learn: ``l0hooks.param_groups(self, lr=…, gate_lr=…)``;
    an optimiser under which they decay is refused. Budgets need nothing: they count the optimiser's steps, and a
    checkpoint of the trainer holds where they stand.

    Parameters
    ----------
    penalties : mapping, optional
        What :func:`l0hooks.penalty` is to add to the loss: ``{"l0": 1e-3}``. Its gradient joins before clipping, once
        a step however many batches are accumulated; its value is logged, and not part of the logged loss.
    example_inputs : sequence, optional
        Positional arguments of the pruned part, for :func:`l0hooks.prune`: coupled gates need them.
    part : str
        Name of the module to prune, the one that was given to ``sparsify``; "" for the LightningModule itself.
    filename : str or None
        Where in the checkpoints' folder (without one: ``default_root_dir``) the pruned model is saved; None for
        nowhere.

    Attributes
    ----------
    pruned : nn.Module or None
        The plain model, once training has ended; in the process of rank 0.

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
        example_inputs: Sequence[Any] | None = None,
        part: str = "",
        filename: str | None = "pruned.safetensors",
    ) -> None:
        self.penalties = dict(penalties or {})
        self.example_inputs = example_inputs
        self.part = part
        self.filename = filename
        self.pruned: nn.Module | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the optimisers move the gates and do not let them decay."""
        self.pruned = None
        check_optimizers(pl_module, trainer.optimizers, "l0hooks.param_groups(self, lr=..., gate_lr=...)")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalties' gradient; gradients are unscaled by now."""
        if self.penalties:
            pl_module.log("l0_penalty", add_penalties(pl_module, self.penalties))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the sizes, as often as the trainer logs."""
        if trainer.global_step % max(getattr(trainer, "log_every_n_steps", 1), 1) == 0:
            pl_module.log_dict(sizes(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, and save where the trainer saves."""
        if trainer.is_global_zero:
            saver = trainer.checkpoint_callback
            folder = getattr(saver, "dirpath", None) or trainer.default_root_dir
            path = None if self.filename is None else Path(folder) / self.filename
            self.pruned = pruned_and_saved(pl_module.get_submodule(self.part), self.example_inputs, path)
