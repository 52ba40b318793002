"""Residual blocks that can be removed whole: entries of a ``ModuleList`` or ``Sequential`` that map x to x + f(x)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.modules import all_tensors, parametrization_lists
from l0hooks._torch.running import OUT_OF_MEMORY, evaluating, shapes_alone, slow_attention
from l0hooks._torch.tensors import beside, has_meta, is_meta, same_tensor
from l0hooks._torch.trees import tree_leaves
from l0hooks.errors import in_one_line
from l0hooks.structure.block_probe import Call, IdentityBlock, Probe
from l0hooks.structure.remove_blocks import entries_of, is_list, remove_blocks

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A module that can be taken out of the list that holds it.

    Attributes
    ----------
    name : str
        Its qualified name.
    among : int
        How many entries its list has.
    list_stays : bool
        Whether at least one entry of the list stays: an empty ``Sequential`` is the identity, but code that loops over
        a ``ModuleList`` may take its first or last.
    tensors : tuple of (names, shape)
        The parameters that go with it; those that other modules use, too, are left out.
    """

    name: str
    among: int
    list_stays: bool
    tensors: tuple[tuple[tuple[str, ...], Shape], ...]

    @property
    def owner(self) -> str:
        """Qualified name of the list."""
        return self.name.rpartition(".")[0]

    def holds(self, name: str) -> bool:
        """Whether the module or tensor called ``name`` lies within the block."""
        return name == self.name or name.startswith(f"{self.name}.")


def residual_blocks(
    model: nn.Module, example_inputs: Sequence[Any], named: Collection[str] = ()
) -> tuple[tuple[Block, ...], dict[str, str]]:
    """The blocks that can be removed from ``model``, and why other entries of the same lists cannot.

    Candidates are entries of a ``ModuleList`` or ``Sequential`` that share their type with another entry and whose
    output is their input plus something: there is a way from one to the other that passes additions, norms and
    elementwise functions only. Where candidates lie within each other, the innermost count. ``model`` must then compute
    without them what it computes where they return their input.

    Parameters
    ----------
    model : nn.Module
        Plain. Everything that running it changes is restored.
    example_inputs : sequence
        Positional arguments of ``model``.
    named : collection of str
        Entries that need neither share their type nor be sums.

    Returns
    -------
    (tuple of Block, dict from name to reason)

    Examples
    --------
    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner = nn.Linear(4, 4)
    ...
    ...     def forward(self, x):
    ...         return x + self.inner(x).relu()
    >>> model = nn.Sequential(nn.Linear(3, 4), Residual(), Residual(), nn.Linear(4, 2))
    >>> blocks, left = residual_blocks(model, (torch.ones(1, 3),))
    >>> [block.name for block in blocks], left["0"]
    (['1', '2'], 'it maps (1, 3) of torch.float32 to (1, 4) of torch.float32')
    """
    candidates = dict(_candidates(model, named))
    calls = _calls(model, example_inputs, candidates)
    reasons: dict[str, str] = {}
    found = []
    for name in candidates:
        why = _misfit(model, name, calls.get(name, []), is_named=name in named)
        if why:
            reasons[name] = why
        else:
            found.append(name)
    within = {name for name in found if any(other.startswith(f"{name}.") for other in found)}
    reasons |= dict.fromkeys(sorted(within), "it holds blocks that can be removed by themselves")
    found = [name for name in found if name not in within]
    needed = _needed(model, example_inputs, found)
    reasons |= needed
    found = [name for name in found if name not in needed]
    reasons = {name: why for name, why in reasons.items() if why}
    return tuple(_block(model, name) for name in found), reasons


def _candidates(model: nn.Module, named: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Entries of lists, by their first names, that share their type with another entry or are ``named``."""
    for owner, module in model.named_modules():
        if is_list(module):
            entries = entries_of(module)
            types = Counter(type(entry) for _, entry in entries)
            for key, entry in entries:
                name = f"{owner}.{key}".lstrip(".")
                alike = name in named or types[type(entry)] > 1
                if alike and next(entry.parameters(), None) is not None:
                    yield name, entry


def _calls(
    model: nn.Module, example_inputs: Sequence[Any], candidates: Mapping[str, nn.Module]
) -> dict[str, list[Call]]:
    """What every candidate was called with, and returned, in one run of ``model`` in evaluation mode."""
    probe = Probe()
    with ExitStack() as stack:
        for name, module in candidates.items():
            for handle in probe.attach(name, module):
                stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(slow_attention())
        if has_meta(model):
            stack.enter_context(shapes_alone())
        model(*beside(model, example_inputs))
    return probe.calls


def _misfit(model: nn.Module, name: str, calls: Sequence[Call], *, is_named: bool) -> str:
    """Why a candidate cannot be a block; empty if it can."""
    module = model.get_submodule(name)
    if sum(one is module for _, one in model.named_modules(remove_duplicate=False)) > 1:
        return "the module has several names"
    if len(calls) != 1:
        return f"it is called {len(calls)} times in a forward"
    (call,) = calls
    if call.problem:
        return call.problem
    if not (call.is_sum or is_named):
        return "its output is not its input plus something"
    if any(parametrization_lists(part) for part in module.modules()):
        return "it has parametrizations"
    return ""


def _block(model: nn.Module, name: str) -> Block:
    owner = model.get_submodule(name.rpartition(".")[0])
    places: dict[tuple[Any, ...], list[tuple[str, Shape]]] = {}
    for module_name, _, tensor_name, tensor in all_tensors(model):
        full = f"{module_name}.{tensor_name}".lstrip(".")
        places.setdefault(same_tensor(tensor), []).append((full, tuple(tensor.shape)))
    own = [
        (tuple(one for one, _ in those), those[0][1])
        for those in places.values()
        if all(one.startswith(f"{name}.") for one, _ in those)
    ]
    return Block(name, len(entries_of(owner)), isinstance(owner, nn.ModuleList), tuple(own))


# --- does the model run without them? ---------------------------------------------------------------------------------


def _needed(model: nn.Module, example_inputs: Sequence[Any], names: Sequence[str]) -> dict[str, str]:
    """The blocks that ``model`` cannot run without, and why: it must compute what it does where they are the identity.

    All are tried at once, of each list all but the first and all but the last; if that fails, each by itself.
    """
    if not names or not _wrong_without_most(model, example_inputs, names):
        return {}
    needed = {name: why for name in names if (why := _wrong(model, example_inputs, [name]))}
    rest = [name for name in names if name not in needed]
    together = _wrong_without_most(model, example_inputs, rest) if rest and needed else ""
    together = together or ("" if needed else _wrong_without_most(model, example_inputs, names))
    return needed | dict.fromkeys(rest if together else (), f"without several of them, {together}")


def _wrong_without_most(model: nn.Module, example_inputs: Sequence[Any], names: Sequence[str]) -> str:
    lists: dict[str, list[str]] = {}
    for name in names:
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    for stays in (0, -1):
        gone = []
        for owner, those in lists.items():
            module = model.get_submodule(owner)
            keep_one = isinstance(module, nn.ModuleList) and len(module) == len(those)
            gone += [name for name in those if not (keep_one and name == those[stays])]
        why = _wrong(model, example_inputs, gone) if gone else ""
        if why:
            return why
    return ""


def _wrong(model: nn.Module, example_inputs: Sequence[Any], names: Sequence[str]) -> str:
    """How ``model`` without these blocks differs from ``model`` where they return their input; empty if it does not."""
    closed, small = (copy.deepcopy(model, {id(p): p for p in model.parameters()}) for _ in range(2))
    for name in names:
        IdentityBlock().attach(closed.get_submodule(name))
    expected = _outputs(closed, example_inputs)
    try:
        remove_blocks(small, names)
        got = _outputs(small, example_inputs)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # noqa: BLE001  # a model's own code can raise anything without a block
        return f"the model raises {in_one_line(error)}"
    if len(expected) != len(got):
        return f"the model returns {len(got)} tensors in place of {len(expected)}"
    return "" if all(map(_equal, expected, got)) else "the model computes something else"


def _outputs(model: nn.Module, example_inputs: Sequence[Any]) -> list[Tensor]:
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(slow_attention())
        if has_meta(model):
            stack.enter_context(shapes_alone())
        return [leaf for leaf in tree_leaves(model(*beside(model, example_inputs))) if isinstance(leaf, Tensor)]


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if is_meta(first) or torch.equal(first, second):
        return True
    if not (first.is_floating_point() or first.is_complex()):
        return False
    scale = float(first.abs().nan_to_num(posinf=0.0, neginf=0.0).max())
    last_place = torch.finfo(first.dtype).eps * scale  # the same operators on the same numbers
    return bool(torch.isclose(first, second, rtol=0.0, atol=last_place, equal_nan=True).all())
