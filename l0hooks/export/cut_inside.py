"""Cut each group inside the smallest module that holds it, so that code with sizes by hand costs that module alone.

Groups that several modules share are cut first, those inside a single module afterwards, from the outside in. What each
module is given and returns before its own groups are cut says what it must return afterwards. A module whose own code
does not run with fewer channels is replaced by its rewritten graph; all others stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.running import OUT_OF_MEMORY, refresh
from l0hooks._torch.trees import tree_leaves, tree_map_only
from l0hooks.attach.copies import run_copy
from l0hooks.errors import StateError, UnsupportedModuleError, in_one_line
from l0hooks.export.comparison import described
from l0hooks.export.cut_and_repair import cut_and_repair
from l0hooks.export.outputs import difference, largest, leaves, outputs_of
from l0hooks.export.recipe import rewrite_by
from l0hooks.structure import ChannelGroup
from l0hooks.structure.cut_graph import FREE
from l0hooks.structure.cut_modules import Bools, Cut, plan_cuts, replace_module

Closing = tuple[ChannelGroup, Bools]  # a group, and which of its members stay
_PLAIN = (Tensor, bool, int, float, str, type(None))


@dataclass
class Calls:
    """What a module is given, by position, and what it returns.

    Attributes
    ----------
    allowed : float
        The difference that rounding may make, as a share of the scale.
    inputs : list of tuple
    expected : list of list
        The leaves of each output.
    strange : str
        What a call was given that is neither a tensor nor a plain value; empty if there is no such call.
    """

    allowed: float
    inputs: list[tuple[Any, ...]] = field(default_factory=list)
    expected: list[list[Any]] = field(default_factory=list)
    strange: str = ""

    def wrong(
        self, model: nn.Module, *, accepts: Callable[[Sequence[Any]], bool] | None = None, folded: bool = False
    ) -> str:
        """What is wrong with ``model`` in place of the module, empty if nothing is; it must take all calls."""
        if self.strange or len(self.inputs) != len(self.expected):
            return self.strange or "a call that does not return"
        if accepts is not None and not all(map(accepts, self.inputs)):
            return "it does not take all sizes that occur"
        try:
            got = outputs_of(model, [_cloned(one) for one in self.inputs])
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # noqa: BLE001  # a module's own code can raise anything if sizes do not fit
            return described(error)
        gap = largest(difference, self.expected, got)
        return "" if gap <= self.allowed else f"a difference of {gap:.1e} of the output's scale"


def cut_inside(model: nn.Module, groups: Sequence[Closing], calls: Calls) -> tuple[nn.Module, dict[str, str]]:
    """A copy of ``model`` without the members of ``groups`` that do not stay, cut module by module.

    Parameters
    ----------
    model : nn.Module
        Plain and uncut; not changed.
    groups : sequence of (ChannelGroup, bool array)
    calls : Calls
        Of ``model`` itself.

    Returns
    -------
    (nn.Module, dict from str to str)
        The copy; and which of its modules are graphs, with what is wrong with their own code.

    Raises
    ------
    StateError, UnsupportedModuleError
        If a module can be cut neither as it is nor as a graph, or the model itself not as it is.
    """
    model = run_copy(model)
    homes: dict[str, list[Closing]] = {}
    called = _called(model, calls)
    for closing in groups:
        if not closing[1].all():
            homes.setdefault(_home(model, closing[0], called), []).append(closing)
    done: list[Closing] = []
    graphs: dict[str, str] = {}
    for depth in sorted({_depth(path) for path in homes}):
        paths = [path for path in homes if _depth(path) == depth and not _is_below(path, graphs)]
        seen = {"": calls} if depth == 0 else _recorded(model, paths, calls)
        for path in paths:
            own, module = homes[path], model.get_submodule(path)
            small = run_copy(module) if path else model
            wrong = cut_and_repair(small, _cuts(path, done, own), _inside(path, own), seen[path])
            if wrong and (not path or any(group.width is not None for group, _ in own)):
                raise StateError(wrong)  # a graph holds the sizes and epsilons of its norms
            if wrong:
                own = [one for other in homes if _is_below(other, (path,)) for one in homes[other]]
                small = _graph(module, _cuts(path, done, own), seen[path], wrong)
                graphs[path] = wrong
            done += own
            if path:
                replace_module(model, module, small)
    refresh(model)
    return model, graphs


def _graph(module: nn.Module, cuts: Sequence[Cut], calls: Calls, wrong: str) -> nn.Module:
    """The rewritten graph of a module, right for all of ``calls``."""
    failed = [wrong]
    for free in () if calls.strange else FREE:
        try:
            graph, sizes = rewrite_by(module, cuts, _cloned(calls.inputs[0]), free)
            if not all(map(sizes.accept, calls.inputs)):  # sizes of 1 that two inputs can only have together
                ones = dict.fromkeys(place for one in calls.inputs for place in sizes.at_one(one))
                graph, sizes = rewrite_by(module, cuts, _cloned(calls.inputs[0]), free, list(ones))
        except (StateError, UnsupportedModuleError) as error:
            failed.append(in_one_line(error))
            continue
        failed.append(calls.wrong(graph, accepts=sizes.accept))
        if not failed[-1]:
            return graph.train(module.training)
    raise StateError("; ".join(dict.fromkeys(failed)))


def _home(model: nn.Module, group: ChannelGroup, called: set[str]) -> str:
    """The smallest module that holds all of a group and is called; by its first name, if it has several.

    Of a residual stream it is the model itself, because smaller modules may return the stream.
    """
    if group.width is not None:
        return ""
    first_names = {module: name for name, module in model.named_modules()}
    names = [name.rpartition(".")[0] for site in group.sites for name in site.names]
    first, *others = [first_names[model.get_submodule(name)].split(".") for name in names]
    path = first
    while any(other[: len(path)] != path for other in others) or (path and ".".join(path) not in called):
        path = path[:-1]
    return ".".join(path)


def _depth(path: str) -> int:
    return len(path.split(".")) if path else 0


def _is_below(path: str, others: Collection[str]) -> bool:
    return any(f"{path}.".startswith(f"{other}.") for other in others)


def _inside(path: str, groups: Sequence[Closing]) -> list[Closing]:
    """The same groups by names inside the module at ``path``."""
    found = []
    for group, stays in groups:
        sites = tuple(replace(site, names=_names_in(path, site.names)) for site in group.sites)
        counts = tuple((_names_in(path, (f"{module}.",))[0].rstrip("."), name) for module, name in group.counts)
        width = None if group.width is None else group.width.within(path)
        found.append((replace(group, sites=sites, counts=counts, width=width), stays))
    return found


def _names_in(path: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names that begin with ``path``, without it."""
    start = f"{path}." if path else ""
    return tuple(name.removeprefix(start) for name in names if name.startswith(start))


def _cuts(path: str, done: Sequence[Closing], groups: Sequence[Closing]) -> list[Cut]:
    """The cuts of ``groups``, all inside the module at ``path``, in the tensors that those of ``done`` left."""
    before = {cut.names: dict(cut.kept) for cut in plan_cuts(done)}
    found = []
    for cut in plan_cuts([*done, *groups]):
        gone = before.get(cut.names, {})
        kept = []
        for axis, indices in cut.kept:
            place = {index: n for n, index in enumerate(gone.get(axis, range(cut.shape[axis])))}
            if len(indices) < len(place):
                kept.append((axis, tuple(place[index] for index in indices)))
        if kept:
            shape = tuple(len(gone[d]) if d in gone else n for d, n in enumerate(cut.shape))
            found.append(Cut(_names_in(path, cut.names), shape, tuple(kept)))
    return found


def _called(model: nn.Module, calls: Calls) -> set[str]:
    """The names of the modules that run."""
    found: set[str] = set()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(lambda *_, name=name: found.add(name)).remove)
        outputs_of(model, [_cloned(one) for one in calls.inputs[:1]])
    return found


def _recorded(model: nn.Module, paths: Sequence[str], calls: Calls) -> dict[str, Calls]:
    """What the modules at ``paths`` are given and return when ``model`` runs."""
    records = {path: Calls(calls.allowed) for path in paths}
    with ExitStack() as hooks:
        for path, record in records.items():
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(_before(record), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(_after(record)).remove)
        outputs_of(model, [_cloned(one) for one in calls.inputs])
    return records


def _before(record: Calls) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = tree_map_only(torch.Size, tuple, _by_position(module, args, kwargs))
        strange = [type(leaf).__name__ for leaf in tree_leaves(given) if not isinstance(leaf, _PLAIN)]
        if strange:
            record.strange = f"a call with {strange[0]}"
        else:
            record.inputs.append(_cloned(given))

    return note


def _by_position(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments of a call by position, with the defaults of those left out between them."""
    signature = inspect.signature(module.forward)
    given = signature.bind(*args, **kwargs).arguments
    last = max((n for n, name in enumerate(signature.parameters) if name in given), default=-1)
    return tuple(given.get(name, p.default) for name, p in list(signature.parameters.items())[: last + 1])


def _after(record: Calls) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not record.strange:
            record.expected.append(list(leaves(output)))

    return note


def _cloned(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors of their own: a module may write into them."""
    cloned: tuple[Any, ...] = tree_map_only(Tensor, lambda t: t.detach().clone(), arguments)
    return cloned
