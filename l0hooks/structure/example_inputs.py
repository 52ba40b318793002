"""``check_examples``: refuse what cannot be the positional arguments of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from l0hooks.errors import SpecError, explain


def check_examples(model: nn.Module, example_inputs: Any) -> None:
    """The example inputs must be a sequence: the positional arguments of ``model``.

    Raises
    ------
    SpecError
        If they are anything else; the message spells them as they should be.

    Examples
    --------
    >>> import torch
    >>> check_examples(nn.Bilinear(2, 2, 2), {"input1": torch.ones(1, 2), "input2": torch.ones(1, 2)})
    Traceback (most recent call last):
    l0hooks.errors.SpecError: example_inputs: the positional arguments must come as a tuple.
      got: dict
      try: example_inputs=(inputs["input1"], inputs["input2"])
    """
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, (str, bytes)):
        return
    hint = "example_inputs=(x,)"
    if isinstance(example_inputs, Mapping):
        hint = _spelled(model, example_inputs)
    raise SpecError(
        explain(
            "example_inputs",
            "the positional arguments must come as a tuple.",
            got=type(example_inputs).__name__,
            hint=hint,
        )
    )


def _spelled(model: nn.Module, given: Mapping[Any, Any]) -> str:
    """Keyword arguments in the order of ``forward``; a dictionary that is itself the argument in a tuple."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not given or not all(key in names for key in given):
        return "example_inputs=(inputs,) for a model that takes one dictionary, else its arguments in order"
    until = max(names.index(key) for key in given)
    values = []
    for parameter in parameters[: until + 1]:
        known = parameter.name in given
        values.append(f'inputs["{parameter.name}"]' if known else repr(_default(parameter)))
    return f"example_inputs=({', '.join(values)}{',' if len(values) == 1 else ''})"


def _default(parameter: inspect.Parameter) -> Any:
    return None if parameter.default is parameter.empty else parameter.default
