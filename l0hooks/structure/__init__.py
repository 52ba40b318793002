"""A model seen as groups of channels that live and die together."""

from l0hooks.structure._channel_groups import channel_groups
from l0hooks.structure.declare import declare_group
from l0hooks.structure.groups import ChannelGroup, ChannelGroups, FrozenChannels, GroupSite, Kind

__all__ = ["ChannelGroup", "ChannelGroups", "FrozenChannels", "GroupSite", "Kind", "channel_groups", "declare_group"]
