"""Hugging Face transformers: the callback for its ``Trainer``, and folders that ``from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from l0hooks.errors import InvalidValueError, SpecError, explain, import_extra
from l0hooks.integrations.common import (
    Penalties,
    add_penalties,
    check_optimizers,
    pruned_and_saved,
    sizes,
    warn_at_the_end,
    warn_if_too_short,
)
from l0hooks.integrations.pretrained import SavedPretrained, from_pretrained, save_pretrained
from l0hooks.structure.example_inputs import ExampleInputs
from l0hooks.training._param_groups import gates_apart
from l0hooks.training.distillation import Distillation

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    _package = import_extra("transformers", extra="transformers", where="l0hooks.integrations.transformers")
    Trainer, TrainerCallback = _package.Trainer, _package.TrainerCallback
    _package = import_extra("accelerate", extra="transformers", where="l0hooks.integrations.transformers")
    AcceleratedOptimizer = _package.optimizer.AcceleratedOptimizer

__all__ = ["SavedPretrained", "SparsifyCallback", "from_pretrained", "save_pretrained"]


class SparsifyCallback(TrainerCallback):
    """Train a gated model: make the optimiser, add penalties, log sizes, and prune at the end.

    Budgets need no further setup: they count the optimiser's steps, and a checkpoint of the trainer holds their state.

    Parameters
    ----------
    gate_lr : float, > 0
        Learning rate of the gates; the trainer's schedule scales it like that of the weights.
    penalties : mapping, optional
        Keywords of :func:`l0hooks.penalty`: ``{"l0": 1e-3}``. The gradient is added after clipping, once for each
        step of the optimiser, also if batches are accumulated. The value is logged apart from the loss.
    example_inputs : sequence or mapping, optional
        Arguments of the model, for :func:`l0hooks.prune`; needed for coupled gates.
    filename : str or None
        File name of the pruned model in ``args.output_dir``; None to not save it.
    distillation : Distillation, optional
        Its loss is added to the ``loss`` that the model returns in training. Give a teacher, or build it before
        training. Parameters of its projections are not trained: let hidden states have equal widths.

    Attributes
    ----------
    pruned : nn.Module or None
        The plain model after training, in the process that saves.

    Raises
    ------
    InvalidValueError
        If ``gate_lr`` is not positive.
    SpecError
        If ``distillation`` has projections.
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
        example_inputs: ExampleInputs | None = None,
        filename: str | None = "pruned.safetensors",
        distillation: Distillation | None = None,
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
        self._distilling = ExitStack()
        self.distillation = distillation
        if distillation is not None and len(list(distillation.parameters())):
            raise SpecError(
                explain(
                    "SparsifyCallback",
                    "the trainer's optimizer holds no projections of hidden states.",
                    expected="hidden states of equal widths",
                    got=", ".join(distillation.projections),
                    hint="a training loop of your own, with distillation.parameters() in the optimizer",
                )
            )

    def optimizer(self, args: TrainingArguments) -> tuple[type[Optimizer], dict[str, Any]]:
        """The optimiser that ``args`` ask for, with the gates in a group of their own without weight decay.

        Pass it to ``Trainer(optimizer_cls_and_kwargs=...)``. The trainer still decides about the weight decay of the
        other parameters, builds the optimiser, and loads its state from checkpoints.
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
        """Check that the optimiser holds the gates, without weight decay, and that schedules can end."""
        self.pruned = None
        hint = "Trainer(optimizer_cls_and_kwargs=callback.optimizer(args), ...)"
        check_optimizers(kwargs["model"], [kwargs["optimizer"]], hint)
        warn_if_too_short(kwargs["model"], state.max_steps - state.global_step)
        self._distilling.close()
        if self.distillation is not None:
            self._distilling.enter_context(_added(self.distillation, kwargs["model"], args))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalties' gradient."""
        if self.penalties:
            optimizer = kwargs["optimizer"]
            scaler = optimizer.scaler if isinstance(optimizer, AcceleratedOptimizer) else None
            scale = 1.0
            if scaler is not None and not args.max_grad_norm > 0:  # clipping has already unscaled the gradients
                scale = scaler.get_scale()
            self._penalty = add_penalties(kwargs["model"], self.penalties, scale)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the sizes to a training log, so that later callbacks see them, and to the history."""
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
        """Prune, and save the result in the trainer's folder."""
        self._distilling.close()
        if args.should_save:
            path = None if self.filename is None or args.output_dir is None else Path(args.output_dir) / self.filename
            self.pruned = pruned_and_saved(kwargs["model"], self.example_inputs, path)
        else:
            warn_at_the_end(kwargs["model"])


@contextmanager
def _added(distillation: Distillation, model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Add the distillation loss to the loss that ``model`` returns in training."""
    with distillation.noting() as states:

        def add(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            if not module.training or output.get("loss") is None:
                return None
            inputs = {name: value for name, value in named.items() if name != "num_items_in_batch"}
            extra = distillation.compare(output, states, given, inputs)
            # with this argument the trainer does not divide by the number of batches that a step adds up
            share = args.gradient_accumulation_steps if named.get("num_items_in_batch") is not None else 1
            output["loss"] = output["loss"] + extra / share
            return output

        handle = model.register_forward_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
