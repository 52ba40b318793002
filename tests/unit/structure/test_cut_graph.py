"""Exports whose sizes may vary."""

import pytest
import torch
from torch import nn

from l0hooks.errors import StateError
from l0hooks.structure.cut_graph import rewrite


class FixedSizes(nn.Module):
    """Its code does not run with sizes that may vary."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        if not isinstance(x.shape[0], int):
            raise NotImplementedError
        return self.second(self.first(x).view(3, 6))


def test_an_export_that_fails_leaves_no_marks_on_the_examples():
    """torch.export marks sizes that may vary; marks that stay would make later exports of the same tensor fail."""
    x = torch.randn(3, 4)
    with pytest.raises(StateError, match="free to vary"):
        rewrite(FixedSizes().eval(), [], (x,), "all")
    assert vars(x) == {}
    rewrite(FixedSizes().eval(), [], (x,), "none")
