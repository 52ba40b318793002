"""Channels that the model's code takes, moves and joins by position: cut exactly, or left alone before training."""

import pytest
import torch
import torch.nn.functional as F
from parameters import slow
from structure_oracle import gap, outputs
from torch import nn

from l0hooks import channel_groups, iter_gates, prune, sparsify

TOLERANCE = 1e-5

# a model that becomes a graph is told of
pytestmark = pytest.mark.filterwarnings("ignore:prune. the smaller model is a GraphModule")


class Moved(nn.Module):
    """Twelve channels, or what a function makes of them, each part read by a layer of its own."""

    def __init__(self, parts, by_hand=False):
        super().__init__()
        self.writer, self.parts, self.by_hand = nn.Conv2d(3, 12, 3, padding=1), parts, by_hand
        self.readers = nn.ModuleList(nn.LazyConv2d(2, 1) for _ in self.taken(torch.zeros(1, 3, 4, 4)))

    def taken(self, x):
        h = self.writer(x)
        if self.by_hand:  # only a graph can be cut then
            h = h.view(-1, 12, 16).view(-1, 12, 4, 4)
        return self.parts(h)

    def forward(self, x):
        return tuple(reader(part) for reader, part in zip(self.readers, self.taken(x), strict=True))


MOVED = {
    "every other": lambda h: (h[:, ::2], h[:, 1::2]),
    "every third of a part": lambda h: (h[:, 1:11:3], h),
    "narrow": lambda h: (h.narrow(1, 0, 5), h.narrow(1, 5, 7)),
    "narrow from the end": lambda h: (h.narrow(1, -5, 4), h),
    "roll": lambda h: (h.roll(1, 1), h),
    "roll of several axes": lambda h: (torch.roll(h, (1, -5, 2), (2, 1, 1)), h),
    "one channel and all": lambda h: (h.select(1, 3).unsqueeze(1), h),
    "the last channel and all": lambda h: (h[:, -1][:, None], h),
    "tensor_split at positions": lambda h: torch.tensor_split(h, (3, 7), 1),
    "tensor_split into sections": lambda h: torch.tensor_split(h, 5, 1),
    "unbind and stack": lambda h: (torch.stack(h.unbind(1), 1),),
    "channel_shuffle of few large groups": lambda h: (F.channel_shuffle(h, 3),),
    "channel_shuffle of many small groups": lambda h: (F.channel_shuffle(h, 4),),
    "stack": lambda h: (torch.stack([h[:, :6], h[:, 6:]], 2).flatten(1, 2),),
    "stack and unbind": lambda h: torch.stack([h[:, :6], h[:, 6:]]).unbind(0),
    "joined along another axis": lambda h: torch.cat([h[:, :6], h[:, 6:]], 2).split(4, 2),
}


@torch.no_grad()
def close_some(model, seed):
    torch.manual_seed(seed)
    for _, gate in iter_gates(model):
        gate.log_alpha.uniform_(0.1, 3.0)
        gate.log_alpha[torch.randperm(len(gate.log_alpha))[: len(gate.log_alpha) // 3]] = -9.0


@pytest.mark.parametrize("by_hand", [False, *slow([True])], ids=["modules", "graph"])
@pytest.mark.parametrize("name", MOVED)
def test_channels_taken_and_moved_by_position_are_cut_exactly(name, by_hand):
    torch.manual_seed(0)
    x, y = torch.randn(3, 3, 4, 4), torch.randn(5, 3, 4, 4)
    model = Moved(MOVED[name], by_hand)
    model(x)  # the readers get their widths
    whole = sum(p.numel() for p in model.eval().parameters())
    sparsify(model, "coupled", example_inputs=(x,))
    for seed in (1, 2):
        close_some(model, seed)
        small = prune(model, example_inputs=(x,))
        assert gap(outputs(model, (y,)), outputs(small, (y,))) < TOLERANCE
        assert sum(p.numel() for p in small.parameters()) < whole


ALONE = {
    "some positions": (lambda h: (torch.stack([h[:, i] for i in (0, 5, 7)], 1),), "by select"),
    "each by itself": (lambda h: (torch.cat([c.unsqueeze(1) for c in h.unbind(1)[:5]], 1),), "by unbind"),
    "windows": (lambda h: (h.unfold(1, 3, 2).mean(-1),), "by unfold"),
    "a diagonal": (lambda h: (h.flatten(2).diagonal(dim1=1, dim2=2)[:, :, None, None],), "by diagonal"),
    "below a diagonal": (lambda h: (h.flatten(2).tril().unsqueeze(3),), "by tril"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_is_taken_one_by_one_is_left_alone_with_the_reason(name):
    parts, reason = ALONE[name]
    x = torch.randn(2, 3, 4, 4)
    model = Moved(parts)
    model(x)
    groups = channel_groups(model.eval(), (x,))
    assert not len(groups)
    assert reason in str(groups)


class ClassToken(nn.Module):
    """A token that only its own head reads, in front of a sequence whose width is that of the input."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 5)), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.cat([self.token.expand(len(x), -1, -1), x], 1)[:, 0])


def test_what_lies_beside_the_input_keeps_its_width():
    assert not len(channel_groups(ClassToken(), (torch.randn(2, 3, 5),)))


def test_a_layer_that_reads_nothing_does_not_stop_the_others():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.none = nn.Linear(3, 8), nn.Linear(8, 2), nn.LazyLinear(2)

        def forward(self, x):
            h = self.first(x)
            return self.second(h) + self.none(h[:, :0])

    model, x = Nothing(), torch.randn(2, 3)
    model(x)
    (group,) = channel_groups(model, (x,))
    assert group.size == 8
