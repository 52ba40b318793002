"""Whether a smaller model computes what a gated one does."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.memory import has_room
from l0hooks._torch.precision import copy_in, in_precision, inputs_in
from l0hooks._torch.running import OUT_OF_MEMORY
from l0hooks.errors import L0HooksWarning, StateError, explain, in_one_line
from l0hooks.export.examples import Case, attempt, batches, lengths, noise_like, smaller, telling
from l0hooks.export.outputs import allowances, difference, excess, has_numbers, largest, outputs_of

_ROUNDING_ULPS = 100  # units in the last place: the tolerance where float64 cannot be run
_LARGEST_TOLERANCE = 0.02  # of the scale, in half precision
_NO_ROOM = (
    "prune: a float64 copy of the model does not fit into memory, so that its own dtype decides: a difference of up to "
    "{:.1e} of an output's scale is taken for rounding. More free memory, or the CPU, lets float64 decide."
)
_MOST_ROUNDING = 100  # tolerances: a larger difference is not rounding; a smaller one is decided in float64


@dataclass(frozen=True)
class _Proof:
    """What the model computes in float64 for all inputs, and by how much rounding may change it."""

    expected: list[list[Any]]
    allowed: list[list[Tensor | None]]


class Comparison:
    """The outputs of a model in evaluation mode, for its examples and for noise like them, of several sizes.

    Other sizes are another batch size, and half the length or image size. Another model is compared twice: in its own
    dtype, which leaves room for rounding, and then as a float64 copy, which leaves none. Where the model's code does
    not run in float64, its own dtype decides.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    example_inputs : sequence
        Positional arguments.
    twin : nn.Module, optional
        A plain copy of ``model`` with the gates folded in. It computes the same in less time, and runs in float64;
        ``model`` itself is run on noise like the examples; on the examples if it does not take noise.
    stays : bool
        Whether ``twin`` (``model`` without one) will be the same at the last comparison; else nothing can be computed
        again.
    quick : bool
        Compare on the examples and on one of them at half its size, and run float64 only where a difference is larger
        than rounding in the model's own dtype: no proof, but it takes little more than two runs of the model.

    Raises
    ------
    StateError
        If the outputs hold no finite number, or something that cannot be compared.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Sequence[Any],
        *,
        twin: nn.Module | None = None,
        stays: bool = True,
        quick: bool = False,
    ) -> None:
        twin = model if twin is None else twin
        self._twin = twin if stays else None
        self.allowed = tolerance(model)
        self._rounding = self.allowed if quick else 0.0
        self._proof: _Proof | bool = True
        cases = self._few(twin, tuple(example_inputs)) if quick else self._many(model, twin, tuple(example_inputs))
        self.inputs = [one for one, _ in cases]
        self.expected = [output for _, output in cases]
        if not has_numbers(self.expected):
            raise StateError(
                explain(
                    "prune",
                    "the outputs for the example inputs must show what the model computes.",
                    expected="at least one finite number",
                    got="outputs without one",
                    hint="examples from the data, and at least one of them",
                )
            )

    def _few(self, twin: nn.Module, examples: tuple[Any, ...]) -> list[Case]:
        """The examples, or noise where they are all alike, and one of them at half its size."""
        varied = examples
        (found,) = outputs_of(twin, [examples])
        if not telling(examples):
            varied, found = noise_like(twin, examples, found) or (examples, found)
        return [(varied, found), *smaller(twin, varied, found)]

    def _many(self, model: nn.Module, twin: nn.Module, examples: tuple[Any, ...]) -> list[Case]:
        (whole,) = outputs_of(twin, [examples])
        noise = noise_like(twin, examples, whole)
        varied, found = (examples, whole) if noise is None else noise
        first = found if model is twin else outputs_of(model, [varied])[0]
        # False: no proof can be had, as when the twin computes something else
        self._proof = self._twin is not None and difference(first, found) <= self.allowed
        sizes = [(one, attempt(twin, one)) for one in list(batches(varied))[1:]]
        resized = [(one, output) for one, output in sizes if output is not None]
        shorter = list(lengths(twin, varied, first))
        return [(varied, first), *([] if noise is None else [(examples, whole)]), *resized, *shorter]

    def wrong(
        self, model: nn.Module, *, accepts: Callable[[Sequence[Any]], bool] | None = None, folded: bool = False
    ) -> str:
        """What is wrong with the outputs of ``model``, empty if nothing is.

        Parameters
        ----------
        model : nn.Module
        accepts : callable, optional
            Whether inputs have sizes for which ``model`` was made; others are left out.
        folded : bool
            Whether weights of ``model`` were rounded after constants were added to them.
        """
        chosen = [n for n, one in enumerate(self.inputs) if accepts is None or accepts(one)]
        if not chosen:
            return "it takes inputs of no example's size"
        try:
            got = outputs_of(model, [self.inputs[n] for n in chosen])
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # noqa: BLE001  # a model's own code can raise anything if sizes do not fit
            return described(error)
        expected = [self.expected[n] for n in chosen]
        gap = largest(difference, expected, got)
        if gap <= self._rounding and self.allowed < _LARGEST_TOLERANCE:
            return ""
        rounding = largest(lambda a, b: difference(a, b, integers=False), expected, got)
        proof = self._proved() if rounding <= _MOST_ROUNDING * self.allowed else None
        if proof is not None:
            return self._wrong_in_double(model, proof, chosen, folded=folded)
        return "" if gap <= self.allowed else f"a difference of {gap:.1e} of the output's scale"  # NaN is wrong, too

    def _wrong_in_double(self, model: nn.Module, proof: _Proof, chosen: Sequence[int], *, folded: bool) -> str:
        try:
            got = _outputs_in(torch.float64, model, [self.inputs[n] for n in chosen])
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # noqa: BLE001  # a model's own code can raise anything in another dtype
            return f"in float64, {described(error)}"
        expected = [proof.expected[n] for n in chosen]
        gap = largest(difference, expected, got)
        right = (
            gap <= self.allowed if folded else largest(excess, expected, [proof.allowed[n] for n in chosen], got) <= 1
        )
        return "" if right else f"a difference of {gap:.1e} of the output's scale in float64"

    def _proved(self) -> _Proof | None:
        """What the model computes in float64; None if its code does not run in float64."""
        if self._proof is True and self._twin is not None:
            self._proof = False
            if not _fits(self._twin, torch.float64):
                warnings.warn(_NO_ROOM.format(self.allowed), L0HooksWarning, stacklevel=2)
                return None
            try:
                expected = _outputs_in(torch.float64, self._twin, self.inputs)
                single = _outputs_in(torch.float32, self._twin, self.inputs)
                self._proof = _Proof(expected, [allowances(a, b) for a, b in zip(expected, single, strict=True)])
            except OUT_OF_MEMORY:
                raise
            except Exception:  # noqa: BLE001  # a model's own code can raise anything in another dtype
                return None
        return self._proof if isinstance(self._proof, _Proof) else None


def _fits(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a copy of ``model`` in this dtype fits into memory beside it."""
    counts = Counter[torch.device]()
    for parameter in model.parameters():
        counts[parameter.device] += parameter.numel()
    return all(has_room(count, dtype, device) for device, count in counts.items())


def _outputs_in(dtype: torch.dtype, model: nn.Module, inputs: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """What a copy of ``model`` in this dtype computes."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")  # the model gave its warnings before, and torch warns of copies of graphs
        return outputs_of(copy_in(dtype, model), inputs_in(dtype, inputs), in_precision(dtype))


def described(error: Exception) -> str:
    """An error in one line, and the line of the model's code that raised it."""
    text = in_one_line(error)
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in ("torch", "l0hooks", "einops") for part in Path(frame.filename).parts)
        and frame.line
        and not frame.filename.startswith("<")
    ]
    return f"{text} at {Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line}" if own else text


def tolerance(model: nn.Module) -> float:
    """The difference that rounding may make, as a share of the scale, in the model's coarsest floating dtype."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    return min(_ROUNDING_ULPS * max(torch.finfo(dtype).eps for dtype in dtypes), _LARGEST_TOLERANCE)
