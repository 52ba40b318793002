"""``Distillation``: a loss that keeps a model near a teacher, in its outputs and in hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l0hooks._torch.running import evaluating
from l0hooks.attach.plain import plain_copy
from l0hooks.errors import InvalidValueError, SpecError, StateError, explain, near_names
from l0hooks.structure.example_inputs import ExampleInputs, positional
from l0hooks.training.batches import floats_of

Match = Literal["logits", "embedding", "numbers"]


class Distillation(nn.Module):
    """A student's forward, and a loss between it and a teacher's on the same inputs.

    ``output, loss = distillation(x)`` stands in place of ``output = model(x)``. With outputs y of the student and t of
    the teacher, along the last axis,

    - ``"logits"``: T²·KL(softmax(t/T) ‖ softmax(y/T)), the mean over all other axes;
    - ``"embedding"``: 1 − cos(y, t);
    - ``"numbers"``: |y − t|² / |t|²;

    and for each hidden state, of the modules named in ``hidden``, weight·|P h − h_t|²/|h_t|², P a learned matrix where
    the widths differ.

    Parameters
    ----------
    student : nn.Module
        The model that trains, or its DDP or FSDP wrapper.
    teacher : nn.Module, optional
        By default the student as it is now, without its gates. It shares the memory of all parameters that do not
        train, so that a student whose weights are frozen has no second copy.
    match : "logits", "embedding" or "numbers"
    output : callable (output of a model, its keyword or positional inputs) -> Tensor of any shape, optional
        What to compare; by default ``output.logits`` where there are any, else the first tensor of
        floating-point numbers.
    hidden : mapping from str to float, or to (str, float), optional
        Names of the student's modules, the name in the teacher where it differs, and the weight in the loss. The first
        tensor in a module's output is its hidden state; of several calls in a forward the last.
    temperature : float, > 0
        T.
    example_inputs : sequence or mapping, optional
        Arguments of both models, needed for ``hidden``: they show the widths.

    Attributes
    ----------
    teacher : nn.Module
        In evaluation mode. Its parameters, and those of the student, are none of this module's.
    projections : nn.ModuleDict
        One for each hidden state whose widths differ; their parameters belong into the optimiser.

    Raises
    ------
    SpecError
        If a name or the way to match is unknown, or hidden states are named without example inputs.
    InvalidValueError
        If a number is out of range.

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> student = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> distillation = Distillation(student)
    >>> _ = sparsify(student, "weight")
    >>> output, loss = distillation(torch.randn(16, 4))
    >>> output.shape, loss.shape, bool(loss > 0)
    (torch.Size([16, 3]), torch.Size([]), True)

    References
    ----------
    Hinton, Vinyals & Dean (2015), Distilling the knowledge in a neural network; Romero et al. (2015), FitNets.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        match: Match = "logits",
        output: Callable[[Any, Any], Tensor] | None = None,
        hidden: Mapping[str, float | tuple[str, float]] | None = None,
        temperature: float = 2.0,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        super().__init__()
        if match not in get_args(Match):
            hint = near_names(str(match), get_args(Match))
            raise SpecError(explain("Distillation", "the way to match must be known.", got=repr(match), hint=hint))
        if not temperature > 0:
            raise InvalidValueError(
                explain("Distillation", "the temperature must be positive.", expected="> 0", got=temperature)
            )
        self.match, self.temperature = match, temperature
        self._output = first_output if output is None else output
        self._pairs = _pairs(hidden or {})
        self._held = {"student": student, "teacher": _teacher_of(student) if teacher is None else teacher.eval()}
        _check_names("student", student, self._pairs)
        _check_names("teacher", self.teacher, [of for of, _ in self._pairs.values()])
        self.projections = nn.ModuleDict()
        if self._pairs:
            self._add_projections(example_inputs)

    @property
    def teacher(self) -> nn.Module:
        """What the student is compared with."""
        return self._held["teacher"]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """The student's output, and the loss, shape (); both models take the arguments.

        Raises
        ------
        StateError
            If shapes differ, or a module of ``hidden`` was not called.
        """
        output, states = self._run("student", args, kwargs)
        return output, self.compare(output, states, args, kwargs)

    def compare(
        self, output: Any, states: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The loss of a forward that the student has made, shape (): the teacher makes the same.

        Parameters
        ----------
        output : object
            What the student returned.
        states : mapping from str to Tensor, any shape
            Its hidden states.
        args, kwargs : tuple and dict
            What it was called with.
        """
        with torch.no_grad():
            expected, theirs = self._run("teacher", args, kwargs)
        given = kwargs or args
        total = self._distance(self._output(output, given), self._output(expected, given))
        for name, (_, weight) in self._pairs.items():
            state, key = states[name], _key(name)
            if key in self.projections:
                state = self.projections[key](state)
            total = total + weight * _relative(state, theirs[name], name)
        return total

    @contextmanager
    def noting(self, which: Literal["student", "teacher"] = "student") -> Iterator[dict[str, Tensor]]:
        """Note the hidden states of a model while it runs, by their names in the student."""
        states: dict[str, Tensor] = {}
        handles = []
        for name, (of, _) in self._pairs.items():
            module = self._held[which].get_submodule(name if which == "student" else of)
            handles.append(module.register_forward_hook(partial(_keep, states, name)))
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, which: Literal["student", "teacher"], args: Any, kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The output of a model, and its hidden states by their names in the student."""
        with self.noting(which) as states:
            output = self._held[which](*args, **kwargs)
        missing = self._pairs.keys() - states.keys()
        if missing:
            raise StateError(
                explain(
                    f"Distillation: {min(missing)!r}",
                    f"hidden states are those of modules that the {which} calls.",
                    got="a module that was not called",
                    hint="a name of a layer that runs in every forward",
                )
            )
        return output, states

    def _distance(self, y: Tensor, t: Tensor) -> Tensor:
        _check_shapes("the output", y, t)
        if self.match == "numbers":
            return _relative(y, t, "the output")
        y, t = y.float(), t.float()
        if self.match == "embedding":
            return (1 - F.cosine_similarity(y, t, dim=-1)).mean()
        ours, theirs = (F.log_softmax(one / self.temperature, dim=-1) for one in (y, t))
        loss: Tensor = self.temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
        return loss

    def _add_projections(self, example_inputs: ExampleInputs | None) -> None:
        """A matrix for each hidden state whose widths differ."""
        if example_inputs is None:
            raise SpecError(
                explain(
                    "Distillation",
                    "the widths of hidden states are found by running both models.",
                    got="hidden without example_inputs",
                    hint="example_inputs=(x,)",
                )
            )
        inputs = positional(self._held["student"], example_inputs)
        with evaluating(self._held["student"]), evaluating(self.teacher):
            ours = self._run("student", inputs, {})[1]
            theirs = self._run("teacher", inputs, {})[1]
        for name, state in ours.items():
            width, wanted = state.shape[-1], theirs[name].shape[-1]
            if width != wanted:
                projection = nn.Linear(width, wanted, bias=False, device=state.device, dtype=state.dtype)
                self.projections[_key(name)] = projection


def _key(name: str) -> str:
    """A name for a ModuleDict, whose keys hold no dots."""
    return name.replace(".", "/")


def _keep(found: dict[str, Tensor], name: str, module: nn.Module, args: object, output: Any) -> None:
    found[name] = first_output(output, args)


def first_output(output: Any, inputs: Any) -> Tensor:
    """``output.logits`` where there are any, else the first tensor of floating-point numbers.

    Raises
    ------
    SpecError
        If there is none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else None
    found = logits if isinstance(logits, Tensor) else next(floats_of(output), None)
    if found is None:
        raise SpecError(
            explain(
                "Distillation",
                "an output must hold floating-point numbers.",
                got=type(output).__name__,
                hint="output=lambda output, inputs: ...",
            )
        )
    return found


def _teacher_of(student: nn.Module) -> nn.Module:
    """A plain copy of the student in evaluation mode, with memory of its own for what trains."""
    teacher = plain_copy(student)
    for parameter in teacher.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
        parameter.requires_grad_(False)
    return teacher.eval()


def _pairs(hidden: Mapping[str, float | tuple[str, float]]) -> dict[str, tuple[str, float]]:
    pairs = {name: value if isinstance(value, tuple) else (name, value) for name, value in hidden.items()}
    for name, (_, weight) in pairs.items():
        if not weight >= 0:
            raise InvalidValueError(
                explain(f"Distillation: {name!r}", "weights must not be negative.", expected=">= 0", got=weight)
            )
    return pairs


def _check_names(whose: str, model: nn.Module, names: Iterable[str]) -> None:
    known = [name for name, _ in model.named_modules()]
    for name in names:
        if name not in known:
            raise SpecError(
                explain(
                    f"Distillation: {name!r}",
                    f"hidden states are those of modules of the {whose}.",
                    got="a name that it does not have",
                    hint=near_names(name, known),
                )
            )


def _relative(y: Tensor, t: Tensor, name: str) -> Tensor:
    """|y − t|² / |t|²."""
    _check_shapes(name, y, t)
    y, t = y.float(), t.float()
    scale = t.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (y - t).square().mean() / scale


def _check_shapes(name: str, y: Tensor, t: Tensor) -> None:
    if y.shape != t.shape:
        raise StateError(
            explain(
                f"Distillation: {name}",
                "student and teacher must compute equal shapes.",
                expected=tuple(t.shape),
                got=tuple(y.shape),
                hint="output=lambda output, inputs: ... that picks what both have",
            )
        )
