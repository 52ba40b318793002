"""The channels, neurons and attention heads that can be removed from a plain model."""

from l0hooks.structure._channel_groups import channel_groups
from l0hooks.structure.declare import declare_group
from l0hooks.structure.groups import ChannelGroup, ChannelGroups, FrozenChannels, GroupSite, Kind

__all__ = ["ChannelGroup", "ChannelGroups", "FrozenChannels", "GroupSite", "Kind", "channel_groups", "declare_group"]
