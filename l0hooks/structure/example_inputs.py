"""Example inputs as people have them, in positional order."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from l0hooks.errors import SpecError, explain

ExampleInputs = Sequence[Any] | Mapping[str, Any]


def positional(model: nn.Module, example_inputs: Any) -> tuple[Any, ...]:
    """The arguments of ``model`` in the order of its ``forward``; defaults fill the gaps between keyword arguments.

    Parameters
    ----------
    model : nn.Module
    example_inputs : sequence or mapping
        Positional arguments; keyword arguments, as a tokenizer returns them; or positional ones and last a mapping of
        keyword arguments. A mapping whose keys are no parameters of ``forward`` is an argument like others.

    Returns
    -------
    tuple

    Raises
    ------
    SpecError
        If they are anything else, or keywords that cannot be put in order.

    Examples
    --------
    >>> positional(nn.Bilinear(2, 2, 2), {"input2": "b", "input1": "a"})
    ('a', 'b')
    >>> positional(nn.Bilinear(2, 2, 2), ("a", {"input2": "b"}))
    ('a', 'b')
    """
    if isinstance(example_inputs, Mapping):
        return _in_order(model, (), example_inputs)
    if not isinstance(example_inputs, Sequence) or isinstance(example_inputs, (str, bytes)):
        raise SpecError(
            explain(
                "example_inputs",
                "arguments must come as a tuple, or by name.",
                expected="(x,) or {'name': x}",
                got=type(example_inputs).__name__,
                hint="example_inputs=(x,)",
            )
        )
    given = tuple(example_inputs)
    last = given[-1] if given else None
    if isinstance(last, Mapping) and last:
        names = [p.name for p in _parameters(model)][len(given) - 1 :]
        if all(key in names for key in last):
            return _in_order(model, given[:-1], last)
    return given


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of ``forward`` that can be given by position."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _in_order(model: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    parameters = _parameters(model)
    names = [p.name for p in parameters]
    unknown = next((str(key) for key in named if key not in names[len(given) :]), None)
    if unknown is not None:
        raise SpecError(
            explain(
                "example_inputs",
                "each name must be a parameter of the model's forward that can be given by position.",
                expected=", ".join(names) or "names in the signature of forward",
                got=unknown,
                hint="example_inputs=(inputs,) for a model that takes one dictionary; else its arguments in order",
            )
        )
    until = max((names.index(key) + 1 for key in named), default=len(given))
    values = list(given)
    for parameter in parameters[len(given) : until]:
        if parameter.name not in named and parameter.default is parameter.empty:
            raise SpecError(
                explain(
                    "example_inputs",
                    "every argument without a default must be given.",
                    expected=parameter.name,
                    got=", ".join(map(str, named)),
                )
            )
        values.append(named.get(parameter.name, parameter.default))
    return tuple(values)
