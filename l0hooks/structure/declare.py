"""``declare_group``: a coupled group declared by hand, for models that ``torch.export`` cannot take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from einops import rearrange
from torch import Tensor, nn

from l0hooks.errors import SpecError, explain, near_names
from l0hooks.structure.groups import ChannelGroup, GroupSite, Ints, Kind
from l0hooks.structure.named_tensors import Tensors
from l0hooks.structure.roles import carried, read, written

Entry = str | tuple[str, Any]
_ROLES = {"outputs": written, "through": carried, "inputs": read}


@dataclass(frozen=True)
class _Layer:
    """A declared layer: the axes of its tensors that hold members, all of one length."""

    name: str
    axes: tuple[tuple[str, int], ...]
    length: int
    indices: Ints | None
    reads: bool
    norm_groups: int | None = None


def declare_group(
    model: nn.Module,
    *,
    outputs: Entry | Sequence[Entry],
    inputs: Entry | Sequence[Entry],
    through: Entry | Sequence[Entry] = (),
    size: int | None = None,
    kind: Kind | None = None,
) -> ChannelGroup:
    """A coupled group declared by hand, for a model that :func:`l0hooks.channel_groups` cannot trace.

    Each of ``outputs``, ``inputs`` and ``through`` is a module's name, or a sequence of names. A pair
    ``(name, indices)`` instead of a name gives the positions of each member along the axis, as an integer array of
    shape (members, width). Without indices the members are consecutive blocks of equal width. ``prune`` compares
    outputs on its example inputs and so finds a layer that was forgotten.

    Parameters
    ----------
    model : nn.Module
        Not changed, and not run.
    outputs : name, pair, or sequence of these
        Layers that write the members: Linear, convolutions, Embedding and Hugging Face Conv1D.
    inputs : name, pair, or sequence of these
        All layers that read them.
    through : name, pair, or sequence of these
        Layers with parameters for each channel in between: BatchNorm, InstanceNorm, GroupNorm, PReLU, depthwise
        convolutions.
    size : int, optional
        Number of members; by default the number of outputs of the first layer, or of groups of a GroupNorm.
    kind : "channel", "neuron" or "head", optional
        "channel" if there is a convolution, else "neuron".

    Returns
    -------
    ChannelGroup
        For ``sparsify(model, "coupled", groups=[...], example_inputs=...)``.

    Raises
    ------
    SpecError
        If a name is unknown, sizes or indices do not fit, or a tied weight is not declared in every layer.
    UnsupportedModuleError
        If a layer cannot lose channels in this role.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    >>> print(declare_group(model, outputs="0", through="1", inputs="3"))
    0 outputs → 1 → 3 inputs: 16 neurons, 15 parameters each
    """
    known = [name for name in get_args(Kind) if name != "width"]  # norms are known of a traced model alone
    if kind is not None and kind not in known:
        raise _refusal("kind", "the name must be known.", repr(kind), near_names(str(kind), known))
    tensors = Tensors(model)
    layers = [
        _layer(model, tensors, entry, role)
        for role, entries in (("outputs", outputs), ("through", through), ("inputs", inputs))
        for entry in _entries(role, entries)
    ]
    for role, reads in (("outputs", False), ("inputs", True)):
        if not _entries(role, inputs if reads else outputs):
            raise _refusal(role, "at least one layer must be named.", "none")
    members = _size(layers, size)
    sites = _tied_sites(model, tensors, _axes(layers, members))
    weights = [site for site in sites if len(site.shape) > 2 and not site.buffer]
    return ChannelGroup(kind or ("channel" if weights else "neuron"), members, sites)


def _entries(role: str, value: Any) -> list[tuple[str, Any]]:
    """Names and pairs as pairs; a name alone has the indices None."""
    if isinstance(value, str) or _is_pair(value):
        value = [value]
    if not isinstance(value, Sequence):
        raise _refusal(role, "layers are named by a string, a pair (name, indices), or a list of these.", repr(value))
    found = []
    for entry in value:
        if not isinstance(entry, str) and not _is_pair(entry):
            raise _refusal(role, "an entry is a module's name, or a pair (name, indices).", repr(entry))
        found.append((entry, None) if isinstance(entry, str) else (entry[0], entry[1]))
    return found


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and not isinstance(value[1], str)


def _layer(model: nn.Module, tensors: Tensors, entry: tuple[str, Any], role: str) -> _Layer:
    name, indices = entry
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise _refusal(role, "the model must have a module of that name.", repr(name), near_names(name, modules))
    module = modules[name]
    axes = _ROLES[role](f"{role} {name!r}", module)
    own = [(".".join(filter(None, (name, tensor))), axis) for tensor, axis in axes.items()]
    present = tuple((full, axis) for full, axis in own if full in tensors.by_name)
    if not present or (own[0] not in present and role != "through"):
        raise _refusal(
            f"{role} {name!r}",
            "the weight must be a plain, initialised parameter.",
            f"no parameter {own[0][0]!r}" if own else "a layer without parameters for each channel",
            "leave the layer out" if role == "through" else "remove gates, weight_norm or the like first",
        )
    full, axis = present[0]
    norm_groups = module.num_groups if isinstance(module, nn.GroupNorm) else None
    length = int(tensors.by_name[full].shape[axis])
    checked = _checked_indices(f"{role} {name!r}", indices, length)
    return _Layer(name, present, length, checked, role == "inputs", norm_groups)


def _checked_indices(where: str, indices: Any, length: int) -> Ints | None:
    """The user's indices, checked against the axis and sorted within each member."""
    if indices is None:
        return None
    try:
        got = np.asarray(indices.detach().cpu() if isinstance(indices, Tensor) else indices)
    except ValueError as error:
        raise _refusal(where, "indices are an integer array of shape (members, width).", "ragged rows") from error
    if got.ndim != 2 or got.dtype.kind not in "iu" or not got.size:
        raise _refusal(
            where,
            "indices are an integer array of shape (members, width).",
            f"shape {got.shape}, {got.dtype}",
            "indices[:, None] for members of width 1",
        )
    if got.min() < 0 or got.max() >= length:
        raise _refusal(where, f"indices lie between 0 and {length - 1}.", f"{got.min()} to {got.max()}")
    if len(np.unique(got)) != got.size:
        raise _refusal(where, "every position belongs to one member.", "an index twice")
    return np.sort(got.astype(np.int64), axis=1)


def _size(layers: Sequence[_Layer], size: int | None) -> int:
    first = layers[0]
    if size is None:
        whole = [p.norm_groups for p in layers if p.norm_groups is not None and p.indices is None]
        size = math.gcd(first.length, *whole) if first.indices is None else len(first.indices)
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 2:
        raise _refusal("size", "a group has at least two members.", repr(size))
    return int(size)


def _axes(layers: Iterable[_Layer], size: int) -> dict[tuple[str, int], tuple[Ints, bool]]:
    """For every tensor and axis the positions of each member, and whether the axis is read."""
    found: dict[tuple[str, int], tuple[Ints, bool]] = {}
    for layer in layers:
        indices = _member_indices(layer, size)
        for key in layer.axes:
            before = found[key][0] if key in found else indices[:, :0]
            if np.intersect1d(before, indices).size:
                raise _refusal(repr(layer.name), "a layer named twice must have other indices.", "an index twice")
            found[key] = np.sort(np.concatenate([before, indices], axis=1), axis=1), layer.reads
    return found


def _member_indices(layer: _Layer, size: int) -> Ints:
    indices = layer.indices
    if indices is None:
        if layer.length % size:
            raise _refusal(
                repr(layer.name),
                f"the layer's {layer.length} channels must make {size} members of equal width.",
                f"{layer.length} / {size}",
                "size=..., or a pair (name, indices)",
            )
        indices = rearrange(np.arange(layer.length), "(member width) -> member width", member=size)
    if len(indices) != size:
        raise _refusal(repr(layer.name), "indices have a row for each member.", f"{len(indices)} rows, not {size}")
    if layer.norm_groups is not None:
        member: Ints = np.full(layer.length, -1)
        member[indices] = np.arange(size)[:, None]
        together = rearrange(member, "(group channel) -> group channel", group=layer.norm_groups)
        if (together != together[:, :1]).any():
            raise _refusal(
                repr(layer.name),
                "a member must be whole groups of a GroupNorm, which mixes the channels of each group.",
                f"{layer.norm_groups} groups of {together.shape[1]} channels, {size} members",
                f"size={whole}" if (whole := math.gcd(size, layer.norm_groups)) > 1 else None,
            )
    return indices


def _tied_sites(
    model: nn.Module, tensors: Tensors, axes: dict[tuple[str, int], tuple[Ints, bool]]
) -> tuple[GroupSite, ...]:
    """One site for each tensor and axis, in the order of the model's state, after checks of tied weights."""
    order = {name: position for position, name in enumerate(tensors.by_name)}
    sites: dict[tuple[int, int], GroupSite] = {}
    for (name, axis), (indices, reads) in axes.items():
        names = tensors.names(name)
        for other in names:
            alike = axes.get((other, axis))
            if not _one_owner(model, name, other) and (alike is None or not np.array_equal(alike[0], indices)):
                raise _refusal(
                    repr(name),
                    "a tied weight must be declared alike in every layer.",
                    f"{other!r}, the same tensor, {'undeclared' if alike is None else 'with other indices'}",
                    f"name {other.rpartition('.')[0]!r}, too, or untie them",
                )
        part = tensors.overlapping(name)
        if part is not None:
            raise _refusal(repr(name), "a weight to cut must not share memory.", f"{part!r} in another shape")
        key = order[names[0]], axis
        reads = reads or (key in sites and sites[key].reads)
        shape = tuple(tensors.by_name[name].shape)
        sites[key] = GroupSite(names, shape, axis, indices, reads, names[0] in tensors.buffers)
    return tuple(sites[key] for key in sorted(sites))


def _one_owner(model: nn.Module, name: str, other: str) -> bool:
    """Whether two names mean one attribute of one module that has two names."""
    (a, _, tensor), (b, _, other_tensor) = name.rpartition("."), other.rpartition(".")
    return tensor == other_tensor and model.get_submodule(a) is model.get_submodule(b)


def _refusal(where: str, must: str, got: str, hint: str | None = None) -> SpecError:
    return SpecError(explain(f"declare_group: {where}", must, got=got, hint=hint))
