"""Sizes that a model's code holds by hand, in attributes and configurations, which may have to follow a cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.utils.hooks import RemovableHandle

from l0hooks._torch.running import OUT_OF_MEMORY
from l0hooks.structure import ChannelGroup, GroupSite
from l0hooks.structure.cut_modules import Bools, Cut
from l0hooks.structure.settings import Path, change, integers

Change = tuple[nn.Module, Path, int]
_MOST_SETS = 100  # of one kind: each is a comparison of two models, most of which end at the first wrong shape
_MOST_IN_ORDER = 200  # in one module: each is a run of the model up to that module


@dataclass
class _Sizes:
    """The sizes around one module that a cut changes, each with what it may become, the likeliest first."""

    exact: dict[int, list[int]] = field(default_factory=dict)
    scaled: dict[int, list[int]] = field(default_factory=dict)

    def note(self, old: int, new: int, *, scaled: bool = False) -> None:
        """``old`` may become ``new``."""
        options = (self.scaled if scaled else self.exact).setdefault(old, [])
        if old != new and new not in options:
            options.append(new)


def repairs(
    model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]], cuts: Sequence[Cut]
) -> Iterator[list[Change]]:
    """Integers of the modules around the cuts that equal an old size, with the new one, in sets to try.

    An integer at one place is changed in all modules at once. Small sets come first; sizes of the cuts themselves come
    before multiples and quotients, and the module next to a cut before those around it.
    """
    sizes, chains = _new_sizes(model, groups, cuts)
    tried: list[list[Change]] = []
    for scaled, nearest in ((False, True), (False, False), (True, True), (True, False)):
        places = _places(sizes, chains, scaled=scaled, nearest=nearest)
        every = [change for versions in places for change in versions[0]]
        for changes in (*itertools.islice(_sets(places), _MOST_SETS), every):
            if changes and changes not in tried:
                tried.append(changes)
                yield changes


def repairs_in_order(
    model: nn.Module,
    groups: Sequence[tuple[ChannelGroup, Bools]],
    cuts: Sequence[Cut],
    run: Callable[[], object],
    *,
    fewest: bool,
) -> list[Change]:
    """Changes that let ``run`` come to its end, found one module after another in the order in which they run.

    Layers of one kind often need different numbers at one place. Where ``run`` stops, sets of changes in the innermost
    module that holds a size are tried until that module is passed: small sets first, or large ones, because a set too
    small may run and compute something else. Empty if ``run`` cannot be brought to its end. ``model`` is left as it
    was.
    """
    sizes, _ = _new_sizes(model, groups, cuts)
    options = {module: list(_options(module, known)) for module, known in sizes.items()}
    options = {module: places for module, places in options.items() if places}
    changes: list[Change] = []
    with _Progress(options) as progress:
        stopped = progress.of(run)
        while stopped is not None:
            passed, running = stopped
            found: list[Change] = []
            for more in (more for module in running for more in _every_set(options[module], fewest=fewest)):
                with changed([*changes, *more]):
                    stopped = progress.of(run)
                if stopped is None or stopped[0] > passed:
                    found = more
                    break
            if not found:
                return []
            changes += found
    return changes


def _options(module: nn.Module, known: _Sizes) -> Iterator[list[list[Change]]]:
    """For each place in ``module`` that holds a size, the changes that may be right, the likeliest first."""
    for path, value in sorted(integers(module), key=lambda one: (len(one[0]), *map(str, one[0]))):
        news = dict.fromkeys((*known.exact.get(value, ()), *known.scaled.get(value, ())))
        if news:
            yield [[(module, path, new)] for new in news]


def _every_set(places: Sequence[Sequence[list[Change]]], *, fewest: bool) -> Iterator[list[Change]]:
    """Sets of places to change at once, each place in every version; small ones first, or large ones."""
    counts = range(1, len(places) + 1)

    def sets() -> Iterator[list[Change]]:
        for count in counts if fewest else reversed(counts):
            for subset in itertools.combinations(places, count):
                for versions in itertools.product(*subset):
                    yield [change for changes in versions for change in changes]

    return itertools.islice(sets(), _MOST_IN_ORDER)


class _Progress:
    """How far a run comes: the number of calls that ended among those of some modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._watched = list(modules)
        self._hooks: list[RemovableHandle] = []
        self._passed = 0
        self._running: list[nn.Module] = []

    def __enter__(self) -> _Progress:
        for module in self._watched:
            self._hooks.append(module.register_forward_pre_hook(self._begins))
            self._hooks.append(module.register_forward_hook(self._ends))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def of(self, run: Callable[[], object]) -> tuple[int, list[nn.Module]] | None:
        """The calls that ended before ``run`` stopped, and the modules that ran then, the innermost first.

        None if it came to its end.
        """
        self._passed, self._running = 0, []
        try:
            run()
        except OUT_OF_MEMORY:
            raise
        except Exception:  # noqa: BLE001  # a model's own code can raise anything if sizes do not fit
            return self._passed, self._running[::-1]
        return None

    def _begins(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        self._passed += 1


@contextmanager
def changed(changes: Sequence[Change]) -> Iterator[Callable[[], None]]:
    """Make ``changes`` in the modules, and take them back at the end unless the function given was called."""
    old = [(vars(module), str(path[0]), vars(module)[str(path[0])]) for module, path, _ in changes]
    kept: list[bool] = []
    for module, path, value in changes:
        change(module, path, value)
    try:
        yield lambda: kept.append(True)
    finally:
        for own, name, before in () if kept else reversed(old):
            own[name] = before


def _new_sizes(
    model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]], cuts: Sequence[Cut]
) -> tuple[dict[nn.Module, _Sizes], list[list[nn.Module]]]:
    """The sizes around each module, and for every tensor that is cut the modules around it from the inside out."""
    sizes: dict[nn.Module, _Sizes] = {}
    chains: dict[str, list[nn.Module]] = {}
    for cut in cuts:
        for owner in chains.setdefault(cut.names[0], list(_owners(model, cut.names[0]))):
            for axis, kept in cut.kept:
                sizes.setdefault(owner, _Sizes()).note(cut.shape[axis], len(kept))
    for group, mask in groups:
        stay = int(mask.sum())
        for site in group.sites:
            for owner in chains.setdefault(site.names[0], list(_owners(model, site.names[0]))):
                known = sizes.setdefault(owner, _Sizes())
                for width in _widths(site):
                    known.note(group.size * width, stay * width)
                    for part in _divisors(width):
                        known.note(group.size * part, stay * part, scaled=True)
                for part in _divisors(group.size):
                    if part < group.size and stay % part == 0:
                        known.note(group.size // part, stay // part, scaled=True)
    return sizes, list(chains.values())


def _widths(site: GroupSite) -> list[int]:
    """1, the width of a member, and that of its parts: the query, key and value of a head in a fused projection."""
    first = site.indices[0]
    runs = np.diff(np.flatnonzero(np.diff(first, prepend=first[0] - 2, append=first[-1] + 2) != 1))
    return sorted({1, len(first), *runs.tolist()})


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _owners(model: nn.Module, tensor: str) -> Iterator[nn.Module]:
    """The modules that contain a tensor, from the inside out; not a layer of torch, which is corrected by itself."""
    path = tensor
    while path:
        path, _, last = path.rpartition(".")
        module = model.get_submodule(path)
        layer = f"{path}.{last}".strip(".") == tensor
        if not (layer and type(module).__module__.startswith("torch.nn.")):
            yield module


def _places(
    sizes: Mapping[nn.Module, _Sizes], chains: Sequence[Sequence[nn.Module]], *, scaled: bool, nearest: bool
) -> list[list[list[Change]]]:
    """For each place the changes there, in several versions if a size may become one of several.

    With ``nearest``, a place is changed in the innermost module around each tensor that holds the size there.
    """
    found: dict[nn.Module, dict[Path, list[int]]] = {}
    for module, known in sizes.items():
        options = {**known.scaled, **known.exact} if scaled else known.exact
        found[module] = {path: options[value] for path, value in integers(module) if options.get(value)}
    chosen: dict[Path, dict[nn.Module, list[int]]] = {}
    for chain in chains:
        taken: set[Path] = set()
        for module in chain:
            here = found.get(module, {})
            for path, news in here.items():
                if not (nearest and path in taken):
                    chosen.setdefault(path, {})[module] = news
            taken |= here.keys()
    ranked = sorted(chosen, key=lambda path: (len(path), *map(str, path)))
    versions = []
    for path in ranked:
        most = max(map(len, chosen[path].values()))
        modules = chosen[path].items()
        versions.append([[(m, path, news[min(v, len(news) - 1)]) for m, news in modules] for v in range(most)])
    return versions


def _sets(places: Sequence[Sequence[list[Change]]]) -> Iterator[list[Change]]:
    """Sets of places to change at once, small ones first: a place too many may be wrong where no example shows it."""
    first = [versions[0] for versions in places]
    every = [version for versions in places for version in versions]
    for count in range(1, len(every) + 1):
        for subset in itertools.combinations(first if count > 2 else every, count):
            yield [change for changes in subset for change in changes]
