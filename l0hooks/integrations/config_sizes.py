"""The sizes of a pruned model in the numbers of its config, where the config has a number for each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from l0hooks.structure.settings import epsilons

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = dict[str, tuple[int, ...]]
Number = int | float
Change = tuple[str, Number | None, Number]  # the number's path in the config, what it was, what it is to be

_KEPT = ("head_dim", "head_size", "d_kv", "kv_channels")  # the size of a head never changes, the number of heads does
_HEAD_SIZE = ("head_dim", "hidden_size", "num_attention_heads")  # read by many classes whose config lacks it


@dataclass(frozen=True)
class SizedConfig:
    """A config whose numbers are as near to a model's sizes as they come.

    Attributes
    ----------
    config : PreTrainedConfig
    changes : tuple of Change
    wrong : tuple of str
        Tensors of the model's state whose shapes the config does not give; empty if it builds the model.
    """

    config: Any
    changes: tuple[Change, ...]
    wrong: tuple[str, ...]


def sized_config(model: PreTrainedModel) -> SizedConfig:
    """The config of ``model`` with numbers that give its present sizes, as far as there are such numbers.

    Numbers are tried whose change brings shapes of the class's own parameters nearer to those of ``model``, the most
    helpful first. The class is built on the meta device, without memory.

    Parameters
    ----------
    model : PreTrainedModel
        Pruned; its config is the dense one's.

    Returns
    -------
    SizedConfig
    """
    wanted = _shapes(model)
    config = copy.deepcopy(model.config)
    found = [_search(type(model), prepared, wanted) for prepared in (config, *_with_head_sizes(config))]
    best = min(found, key=lambda one: len(one.wrong))
    return best if best.wrong else _with_heads_as_wide(type(model), model.config, best, wanted)


def _search(kind: type[nn.Module], config: Any, wanted: Shapes) -> SizedConfig:
    changes: list[Change] = []
    shapes = _built(kind, config)
    if shapes is None:
        return SizedConfig(config, (), tuple(wanted))
    pairs = _pairs(shapes, wanted)  # an axis may be a sum: fused projections
    while shapes != wanted:
        changed = [(c, _changed(config, c)) for c in _candidates(config, pairs | _pairs(shapes, wanted))]
        tried = [(c, one, _built(kind, one)) for c, one in changed if one is not None]
        better = [(_off(got, wanted), n) for n, (_, _, got) in enumerate(tried) if got is not None]
        off, number = min(better, default=(_off(shapes, wanted), 0))
        if off >= _off(shapes, wanted):
            break
        change, config, built = tried[number]
        shapes = shapes if built is None else built
        changes.append(change)
    wrong = tuple(name for name, shape in wanted.items() if shapes.get(name) != shape)
    return SizedConfig(config, tuple(changes), wrong)


def _with_heads_as_wide(kind: type[nn.Module], dense: Any, found: SizedConfig, wanted: Shapes) -> SizedConfig:
    """The same with as many heads as are as wide as before, where shapes fit any number of heads.

    Those of a class whose heads share the width of the stream do; pruning never changes the size of a head.
    """
    _, width, heads = _HEAD_SIZE
    own: list[Any] = [getattr(one, name, None) for one in (dense, found.config) for name in (width, heads)]
    if not all(type(number) is int and number > 0 for number in own):
        return found
    old_width, old_heads, new_width, new_heads = own
    fitting = new_width * old_heads // old_width
    if fitting == new_heads or fitting * old_width != new_width * old_heads:
        return found
    name = getattr(dense, "attribute_map", {}).get(heads, heads)
    config = _changed(found.config, (name, new_heads, fitting))
    if config is None or _built(kind, config) != wanted:
        return found
    others = [change for change in found.changes if change[0] != name]
    return SizedConfig(config, (*others, (name, old_heads, fitting)), ())


def with_epsilons(found: SizedConfig, model: PreTrainedModel) -> SizedConfig:
    """The config with the epsilons of the norms of ``model`` too, which a narrower stream has changed.

    A number of the config is changed that equals what the class gives its norms; whether that makes the right model is
    seen when it is loaded.
    """
    built = _on_meta(type(model), found.config)
    if found.wrong or built is None:
        return found
    modules = dict(model.named_modules())
    config, changes = found.config, list(found.changes)
    wanted = {
        (value, dict(epsilons(modules[name])).get(own, value))
        for name, module in built.named_modules()
        for own, value in epsilons(module)
        if name in modules
    }
    for old, new in sorted(wanted):
        for path in [path for path, value in _floats(config) if value == old != new]:
            changed = _changed(config, (path, old, new))
            if changed is not None:
                config = changed
                changes.append((path, old, new))
    return SizedConfig(config, tuple(changes), ())


def _changed(config: Any, change: Change) -> Any:
    """A copy of the config with a change; None if the config refuses it."""
    config = copy.deepcopy(config)
    path, _, place = change[0].partition("[")
    *owners, name = path.split(".")
    part = config
    for owner in owners:
        part = getattr(part, owner)
    value: Any = change[2]
    if place:
        entries, number = getattr(part, name), int(place.removesuffix("]"))
        value = type(entries)((*entries[:number], change[2], *entries[number + 1 :]))
    try:
        setattr(part, name, value)
    except Exception:  # noqa: BLE001  # configs check types by errors of their own
        return None
    return config


def _built(kind: type[nn.Module], config: Any) -> Shapes | None:
    """The shapes of the class; None if it refuses the config."""
    built = _on_meta(kind, config)
    return None if built is None else _shapes(built)


def _on_meta(kind: type[nn.Module], config: Any) -> nn.Module | None:
    """A model of the class without memory; None if it refuses the config."""
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except Exception:  # noqa: BLE001  # a class's own checks of its config can raise anything
        return None


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _off(shapes: Shapes, wanted: Shapes) -> int:
    """How many axes have another length."""
    if shapes.keys() != wanted.keys() or any(len(shapes[name]) != len(shape) for name, shape in wanted.items()):
        return 1 << 30
    return sum(a != b for name, shape in wanted.items() for a, b in zip(shape, shapes[name], strict=True))


def _pairs(shapes: Shapes, wanted: Shapes) -> set[tuple[int, int]]:
    """The lengths of axes that are wrong, and the right ones."""
    alike = [(shapes[name], shape) for name, shape in wanted.items() if len(shapes.get(name, ())) == len(shape)]
    return {pair for one, other in alike for pair in zip(one, other, strict=True) if pair[0] != pair[1]}


def _candidates(config: Any, pairs: set[tuple[int, int]]) -> Iterator[Change]:
    """Changes of one number that turn the length of a wrong axis, or a part of it, into the right one."""
    for path, value in _numbers(config):
        if value is None:
            yield from ((path, None, new) for new in sorted({new for _, new in pairs}))
            continue
        found = {
            new * value // old for old, new in pairs if value > 0 and old % value == 0 and new % (old // value) == 0
        }
        yield from ((path, value, number) for number in sorted(found))


def _numbers(config: Any, path: str = "") -> Iterator[tuple[str, int | None]]:
    """The integers of a config, of its lists and of the configs within it, and what is left open."""
    for name, value in vars(config).items():
        if name.startswith("_") or name.endswith("_id") or any(kept in name for kept in _KEPT):
            continue
        if value is None or type(value) is int:
            yield path + name, value
        elif type(value) in (list, tuple) and all(type(entry) is int for entry in value):
            yield from ((f"{path}{name}[{number}]", entry) for number, entry in enumerate(value))
        elif _is_config(value):
            yield from _numbers(value, f"{path}{name}.")


def _floats(config: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers with a fraction of a config and of those within it."""
    for name, value in vars(config).items():
        if type(value) is float:
            yield path + name, value
        elif _is_config(value):
            yield from _floats(value, f"{path}{name}.")


def _is_config(value: object) -> bool:
    return isinstance(getattr(type(value), "model_type", None), str)


def _with_head_sizes(config: Any) -> Iterator[Any]:
    """The config with the size of a head written down, so that their number can change alone."""
    name, width, heads = _HEAD_SIZE
    table = vars(config)
    if table.get(name) is None and type(table.get(width)) is int and type(table.get(heads)) is int:
        prepared = _changed(config, (name, None, table[width] // table[heads]))
        if prepared is not None:  # some configs compute it, and cannot be told
            yield prepared
