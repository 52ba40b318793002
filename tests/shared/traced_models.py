"""The zoo of structures, each model traced once a process: exporting it takes most of the time of its tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
from structure_models import HUGGING_FACE, ZOO
from structure_oracle import attributes_of
from torch import nn

from l0hooks.structure import ChannelGroup, channel_groups

ENTRIES = {**ZOO, **HUGGING_FACE}


CHANGED: set[str] = set()  # entries whose modules held something else after tracing


@functools.cache
def traced(name: str) -> tuple[nn.Module, tuple[Any, ...], Any]:
    """A model, its inputs and its channel groups; tests leave the model as it is, or restore it."""
    entry = ENTRIES[name]
    model = entry.make()
    torch.manual_seed(1)
    inputs = entry.inputs()
    before = attributes_of(model)
    groups = channel_groups(model, inputs)
    if attributes_of(model) != before:
        CHANGED.add(name)
    return model, inputs, groups


def groups_of(name: str) -> list[ChannelGroup]:
    """The groups, which fit every model of the entry."""
    return list(traced(name)[2])
