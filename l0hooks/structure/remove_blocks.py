"""Take blocks out of the lists that hold them, and correct the numbers and tables of layers that the code keeps."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from l0hooks._torch.modules import children_of
from l0hooks.structure.settings import integers

KEPT = "kept_blocks"  # at a list: how many entries the dense model's has, and which of them are left
Renaming = dict[str, str | None]  # the old names of entries of lists: their new names, None for those removed
_COUNTS = frozenset(  # what configs and models call the number of their layers
    {
        *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "num_blocks", "n_blocks"),
        *("num_encoder_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"),
    }
)
_HALVES = ("encoder", "decoder")
_NUMBERS = ("layer", "block", "idx", "index", "depth")  # in the name of an attribute that holds a block's own number
_PER_LAYER = ("layer", "block", "pattern")  # in the name of a list that holds something for each layer


def is_list(module: nn.Module) -> bool:
    """Whether the entries of ``module`` are called one after the other, by its own code or by that around it.

    Examples
    --------
    >>> is_list(nn.ModuleList()), is_list(nn.Sequential()), is_list(nn.ModuleDict())
    (True, True, False)
    """
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain or isinstance(module, nn.ModuleList)


def entries_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The entries of a list with their names in it; a module that it holds twice comes twice."""
    return [(key, entry) for key, entry in children_of(module).items() if entry is not None]


def remove_blocks(model: nn.Module, names: Iterable[str]) -> Renaming:
    """Take blocks out of their lists, **in place**.

    Entries after them get new numbers, in the names of modules and in attributes like ``layer_idx``; so do the number
    of layers and lists with something for each layer in the configs of the modules around, which are copied before.
    Each list remembers, in a plain attribute, which entries of the dense model it has left.

    Parameters
    ----------
    model : nn.Module
    names : iterable of str
        Qualified names of entries of lists.

    Returns
    -------
    dict from str to str or None
        The new names of all entries of these lists; None for those that are gone.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 3))
    >>> remove_blocks(model, ["1"])
    {'0': '0', '1': None, '2': '1'}
    >>> model.kept_blocks
    (3, (0, 2))
    """
    by_list: dict[str, set[str]] = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        by_list.setdefault(owner, set()).add(key)
    if by_list:
        _own_configs(model)
    renaming: Renaming = {}
    for owner, gone in by_list.items():
        module = model.get_submodule(owner)
        keys = [key for key, _ in entries_of(module)]
        kept = [number for number, key in enumerate(keys) if key not in gone]
        new = _keep(module, keys, kept)
        prefix = f"{owner}." if owner else ""
        renaming |= {prefix + key: None if one is None else prefix + one for key, one in zip(keys, new, strict=True)}
        _correct_settings(model, owner, len(keys), kept)
    return renaming


def kept_blocks(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """By the name of each list that lost entries: how many the dense model's has, and which of them are left."""
    return {
        name: vars(module)[KEPT] for name, module in model.named_modules() if is_list(module) and KEPT in vars(module)
    }


def renamed(name: str, renaming: Renaming) -> str | None:
    """The new name of a module or tensor, None if it is gone.

    Examples
    --------
    >>> renamed("layers.2.fc.weight", {"layers.1": None, "layers.2": "layers.1"})
    'layers.1.fc.weight'
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        head = ".".join(parts[:length])
        if head in renaming:
            new = renaming[head]
            return None if new is None else ".".join([new, *parts[length:]])
    return name


def _keep(module: nn.Module, keys: Sequence[str], kept: Sequence[int]) -> list[str | None]:
    """Leave only these entries in a list; the new name of each old one."""
    _correct_numbers([entry for _, entry in entries_of(module)], kept)
    numbered = list(keys) == [str(number) for number in range(len(keys))]
    for number in sorted(set(range(len(keys))) - set(kept), reverse=True):
        if numbered and isinstance(module, (nn.ModuleList, nn.Sequential)):
            del module[number]  # which numbers the rest anew
        else:
            delattr(module, keys[number])
    count, before = vars(module).get(KEPT, (len(keys), tuple(range(len(keys)))))
    vars(module)[KEPT] = (count, tuple(before[number] for number in kept))
    place = {number: str(new) for new, number in enumerate(kept)}
    return [None if n not in place else place[n] if numbered else keys[n] for n in range(len(keys))]


def _correct_numbers(blocks: Sequence[nn.Module], kept: Sequence[int]) -> None:
    """Where modules of blocks hold their block's own number, plus the same in all of them, put the new one."""
    found: dict[tuple[str, str], dict[int, int]] = {}
    for number, block in enumerate(blocks):
        for path, module in block.named_modules():
            for place, value in integers(module):
                name = str(place[0])
                if len(place) == 1 and name not in _COUNTS and any(part in name for part in _NUMBERS):
                    found.setdefault((path, name), {})[number] = value
    for (path, name), values in found.items():
        offsets = {value - number for number, value in values.items()}
        if len(offsets) == 1 and (len(values) > 1 or offsets <= {0, 1}):
            for new, number in enumerate(kept):
                if number in values:
                    vars(blocks[number].get_submodule(path))[name] = new + min(offsets)


# --- configs ----------------------------------------------------------------------------------------------------------


def _own_configs(model: nn.Module) -> None:
    """Give the modules of ``model`` copies of their configs, **in place**; what was one object stays one."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, config in list(_configs(module)):
            vars(module)[name] = copy.deepcopy(config, memo)


def _configs(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        plain = value is None or isinstance(value, (nn.Module, Tensor, type, str, int, float, list, tuple, dict))
        if "config" in name and not plain and not callable(value):
            yield name, value


def _correct_settings(model: nn.Module, owner: str, count: int, kept: Sequence[int]) -> None:
    """Correct the numbers of layers, and what stands for each of them, at the modules around a list of ``count``."""
    parts = owner.split(".") if owner else []
    above = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]
    done: set[int] = set()
    for module in reversed(above):
        _correct_table(vars(module), owner, count, kept)
        for _, config in _configs(module):
            if id(config) not in done:
                done.add(id(config))
                _correct_table(vars(config), owner, count, kept)


def _correct_table(table: dict[str, Any], owner: str, count: int, kept: Sequence[int]) -> None:
    """The same for one table of attributes."""
    numbers = [name for name, value in table.items() if name in _COUNTS and type(value) is int and value == count]
    for name in _of_this_half(numbers, owner):
        table[name] = len(kept)
    lists = [
        name
        for name, value in table.items()
        if type(value) in (list, tuple) and len(value) == count and any(part in name for part in _PER_LAYER)
    ]
    for name in _of_this_half(lists, owner):
        if name != KEPT:
            table[name] = type(table[name])(table[name][number] for number in kept)


def _of_this_half(names: Sequence[str], owner: str) -> list[str]:
    """Of an encoder's and a decoder's names in one table, those that the list at ``owner`` means."""
    words = [half for half in _HALVES if half in owner]
    own = [name for name in names if any(word in name for word in words)]
    return own or [name for name in names if not any(half in name for half in _HALVES)]
