"""``channel_groups``: find the channel groups of a model in its exported graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from einops import rearrange
from torch import nn

from l0hooks.structure.example_inputs import ExampleInputs, positional
from l0hooks.structure.export_trace import export_and_trace
from l0hooks.structure.frozen import cannot_go, frozen_channels
from l0hooks.structure.groups import ChannelGroup, ChannelGroups, FrozenChannels, GroupSite, Ints, Kind
from l0hooks.structure.references import Parameter
from l0hooks.structure.tracer import Tracer
from l0hooks.structure.training_trace import breaking_training
from l0hooks.structure.union_find import squeeze_constant, varies
from l0hooks.structure.width.search import trace_with_width
from l0hooks.structure.with_experts import with_experts


def channel_groups(
    model: nn.Module, example_inputs: ExampleInputs, *, kinds: Collection[Kind] | None = None
) -> ChannelGroups:
    """The channels, neurons and attention heads that can be removed from ``model``; its residual width if asked for.

    The model is exported in evaluation mode and is not changed; if it has layers that it calls in training only, as
    the auxiliary heads of GoogLeNet, a second time in training mode. Each group lists every tensor axis that holds its
    members. If gates multiply the weights that *read* the members, a member with a closed gate can be cut out of
    all these axes without changing any output.

    Parameters
    ----------
    model : nn.Module
        Any model that ``torch.export`` takes.
    example_inputs : sequence or mapping
        Arguments of ``model``: positional ones, keyword ones as a tokenizer returns them, or both, the keywords last.
    kinds : collection of "channel", "neuron", "head" and "width", optional
        Only groups of these kinds; without it, of all but "width". The channels of a residual stream, "width", are
        found only where they are named here.

    Returns
    -------
    ChannelGroups
        A sequence of :class:`ChannelGroup`; ``.frozen`` says what cannot be removed and why.

    Raises
    ------
    SpecError
        If ``example_inputs`` are no arguments of the model.
    UnsupportedModuleError
        If ``torch.export`` cannot trace the model.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> print(channel_groups(model, (torch.zeros(2, 8),)))
    0 outputs → 2 inputs: 16 neurons, 13 parameters each
    frozen: an output of the model: 2
    """
    return with_experts(model, positional(model, example_inputs), lambda m, i: groups_and_program(m, i, kinds)[0])


def _kind(sites: list[GroupSite], in_attention: bool) -> Kind:
    weights = [s for s in sites if len(s.shape) > 1 and not s.buffer]
    if in_attention and any(s.indices.shape[1] > 1 for s in weights):
        return "head"
    return "channel" if any(len(s.shape) > 2 for s in weights) else "neuron"
