"""Gates under the ``Trainer`` of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from l0hooks.errors import InvalidValueError, explain, import_extra
from l0hooks.integrations.common import Penalties, add_penalties, check_optimizers, pruned_and_saved, sizes
from l0hooks.training._param_groups import gates_apart

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    _package = import_extra("transformers", extra="transformers", where="l0hooks.integrations.transformers")
    Trainer, TrainerCallback = _package.Trainer, _package.TrainerCallback


class SparsifyCallback(TrainerCallback):
    """Trains a model that was given gates: optimiser, penalties, log, and the pruned model at the end.

    Budgets need nothing: they count the optimiser's steps, and a checkpoint of the trainer holds where they stand.

    Parameters
    ----------
    gate_lr : float, > 0
        Learning rate of the gates; the trainer's schedule scales it as it scales the weights'.
    penalties : mapping, optional
        What :func:`l0hooks.penalty` is to add to the loss: ``{"l0": 1e-3}``. Its gradient joins after clipping, once
        a step however many batches are accumulated; its value is logged, and not part of the logged loss.
    example_inputs : sequence, optional
        Positional arguments of the model, for :func:`l0hooks.prune`: coupled gates need them.
    filename : str or None
        Where in ``args.output_dir`` the pruned model is saved; None for nowhere.

    Attributes
    ----------
    pruned : nn.Module or None
        The plain model, once training has ended; in the process that saves.

    Raises
    ------
    InvalidValueError
        If ``gate_lr`` is not positive.
    MissingExtraError
        On import, if transformers is not installed.

    Examples
    --------
    ``Trainer(model, args, callbacks=[callback], optimizer_cls_and_kwargs=callback.optimizer(args), ...)`` with

    >>> callback = SparsifyCallback(gate_lr=0.05, penalties={"l2": 1e-4})
    >>> callback.pruned is None
    True
    """

    def __init__(
        self,
        *,
        gate_lr: float = 0.05,
        penalties: Penalties | None = None,
        example_inputs: Sequence[Any] | None = None,
        filename: str | None = "pruned.safetensors",
    ) -> None:
        if not gate_lr > 0:
            raise InvalidValueError(
                explain("SparsifyCallback", "gate_lr must be positive.", expected="> 0", got=gate_lr)
            )
        self.gate_lr = gate_lr
        self.penalties = dict(penalties or {})
        self.example_inputs = example_inputs
        self.filename = filename
        self.pruned: nn.Module | None = None
        self._penalty: float | None = None

    def optimizer(self, args: TrainingArguments) -> tuple[type[Optimizer], dict[str, Any]]:
        """The optimiser that ``args`` ask for, with the gates in a group of their own that does not decay.

        For ``Trainer(optimizer_cls_and_kwargs=...)``: the trainer still decides what else decays, when the optimiser
        is built, and loads its state from checkpoints. Groups that a callback splits later would be too late for the
        scheduler and for such a state.
        """
        chosen, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        base: type[Optimizer] = chosen
        rate = self.gate_lr

        def init(self: Optimizer, params: Any, *rest: Any, **options: Any) -> None:
            base.__init__(self, gates_apart(params, gate_lr=rate), *rest, **options)

        return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__}), kwargs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the optimiser moves the gates and does not let them decay."""
        self.pruned = None
        hint = "Trainer(optimizer_cls_and_kwargs=callback.optimizer(args), ...)"
        check_optimizers(kwargs["model"], [kwargs["optimizer"]], hint)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalties' gradient."""
        if self.penalties:
            scaler = getattr(kwargs["optimizer"], "scaler", None)
            scale = 1.0
            if scaler is not None and not args.max_grad_norm > 0:  # clipping takes the loss scale out
                scale = scaler.get_scale()
            self._penalty = add_penalties(kwargs["model"], self.penalties, scale)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the sizes to a training log, for the callbacks that come after this one, and to the history."""
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs:
            return
        found = sizes(kwargs["model"])
        if self._penalty is not None:
            found["l0_penalty"] = self._penalty
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune, and save where the trainer saves."""
        if args.should_save:
            path = None if self.filename is None or args.output_dir is None else Path(args.output_dir) / self.filename
            self.pruned = pruned_and_saved(kwargs["model"], self.example_inputs, path)
