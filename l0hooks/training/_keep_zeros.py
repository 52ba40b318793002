"""``keep_zeros``: the zeros of a pruned plain model stay zeros while it trains on."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from l0hooks._torch.tensors import is_meta
from l0hooks.errors import L0HooksWarning, SpecError, StateError, explain
from l0hooks.structure.patterns import Pattern, as_patterns, matches, named_modules, no_match


class KeptZeros:
    """Zeros that stay; :func:`keep_zeros` makes it.

    Parameters
    ----------
    parameters : mapping from str to nn.Parameter
        By their qualified names.

    Attributes
    ----------
    names : tuple of str
        The parameters, by their qualified names.
    zeros : int
        How many zeros they hold together.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
    >>> kept = keep_zeros(model)
    >>> kept.names, kept.zeros
    (('weight',), 1)
    >>> kept.remove()
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names = tuple(parameters)
        self._masks = [_Mask(parameter) for parameter in parameters.values()]
        self.zeros = sum(int(one.mask.sum()) for one in self._masks)
        self._handles: list[Any] = [
            parameter.register_hook(one.clean)  # type: ignore[no-untyped-call]
            for parameter, one in zip(parameters.values(), self._masks, strict=True)
            if parameter.requires_grad
        ]
        self._handles.append(register_optimizer_step_post_hook(self._after_step))
        self._mine: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[_Mask]] = weakref.WeakKeyDictionary()

    def remove(self) -> None:
        """Let the zeros change again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer not in self._mine:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            self._mine[optimizer] = [one for one in self._masks if one.number in held]
        for one in self._mine[optimizer]:
            one.restore()


class _Mask:
    """Where one parameter is zero."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.number = id(parameter)
        self._parameter = weakref.ref(parameter)
        self.mask = parameter.detach() == 0

    def clean(self, grad: Tensor) -> Tensor:
        """A gradient without a share for the zeros: it counts in no norm and in no momentum."""
        return grad.masked_fill(self._on(grad), 0.0)

    def restore(self) -> None:
        """Set the parameter to zero again where it was."""
        parameter = self._parameter()
        if parameter is not None:
            parameter.masked_fill_(self._on(parameter), 0.0)

    def _on(self, tensor: Tensor) -> Tensor:
        if self.mask.device != tensor.device:
            self.mask = self.mask.to(tensor.device)
        return self.mask


def keep_zeros(model: nn.Module, modules: Pattern | Sequence[Pattern] | None = None) -> KeptZeros:
    """Keep the exact zeros of the weights of a plain model while it trains on, under any optimiser.

    After every step of an optimiser that holds a weight its zeros are set to zero again, and their gradient is zero, so
    that they count in no gradient norm. The model stays plain: the optimiser is told, not the model. Copies and
    unpickled models need a call of their own.

    Parameters
    ----------
    model : nn.Module
        Without gates, as :func:`l0hooks.prune` returns it.
    modules : pattern or sequence of patterns, optional
        Modules whose parameters of two and more axes keep their zeros. By default those of all modules, but none that
        is zero altogether, as adapters start.

    Returns
    -------
    KeptZeros
        With ``names``, ``zeros`` and ``remove()``.

    Raises
    ------
    StateError
        If no weight has zeros, or one has no data or is stored as a sparse tensor.
    SpecError
        If a pattern matches nothing.

    Warns
    -----
    L0HooksWarning
        If weights that are zero altogether are left out.

    Examples
    --------
    >>> from l0hooks import Budget, prune, sparsify
    >>> gated = nn.Sequential(nn.Linear(8, 4))
    >>> _ = sparsify(gated, "weight", budget=Budget(sparsity=0.75, unit="gates", steps=0))
    >>> model = prune(gated)
    >>> kept = keep_zeros(model)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(16, 8)).square().sum().backward()
    ...     optimizer.step()
    >>> kept.zeros, int((model[0].weight == 0).sum())
    (24, 24)
    """
    chosen, empty = {}, []
    for name, parameter in _candidates(model, modules):
        _check(name, parameter)
        zeros = parameter.detach() == 0
        if bool(zeros.all()) and modules is None:
            empty.append(name)
        elif bool(zeros.any()):
            chosen[name] = parameter
    if not chosen:
        raise StateError(
            explain(
                "keep_zeros",
                "weights must hold exact zeros.",
                got="none in parameters of two and more axes",
                hint="prune(model) of a gated model; gated models keep their closed gates by themselves",
            )
        )
    if empty:
        text = explain(
            "keep_zeros",
            "weights that are zero altogether are left to train.",
            got=", ".join(empty[:4]) + (f" and {len(empty) - 4} more" if len(empty) > 4 else ""),
            hint="keep_zeros(model, modules) names the modules whose zeros are to stay",
        )
        warnings.warn(text, L0HooksWarning, stacklevel=2)
    return KeptZeros(chosen)


def _candidates(model: nn.Module, modules: Pattern | Sequence[Pattern] | None) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of two and more axes of all modules, or of those that a pattern matches; tied ones once."""
    patterns = None if modules is None else as_patterns(modules)
    found = dict(named_modules(model))
    for pattern in patterns or ():
        if not any(matches(pattern, name, module) for name, module in found.items()):
            raise SpecError(no_match("keep_zeros", pattern, found))
    seen: set[int] = set()
    for name, module in found.items():
        if patterns is not None and not any(matches(pattern, name, module) for pattern in patterns):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and parameter.is_floating_point() and id(parameter) not in seen:
                seen.add(id(parameter))
                yield ".".join(filter(None, (name, own))), parameter


def _check(name: str, parameter: nn.Parameter) -> None:
    if is_meta(parameter) or parameter.layout is not torch.strided:
        got = "a weight on the meta device" if is_meta(parameter) else f"a weight stored as {parameter.layout}"
        raise StateError(
            explain(
                f"keep_zeros: {name!r}",
                "weights must be dense and have data.",
                got=got,
                hint="prune without sparse_format, and train on the device where the data are",
            )
        )
