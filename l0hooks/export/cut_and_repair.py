"""Cut modules, and repair the sizes that their attributes hold by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import nn

from l0hooks._torch.running import refresh
from l0hooks.export.outputs import outputs_of
from l0hooks.export.repairs import Change, changed, repairs, repairs_in_order
from l0hooks.structure import ChannelGroup
from l0hooks.structure.cut_experts import set_counts
from l0hooks.structure.cut_modules import Bools, Cut, apply_cuts
from l0hooks.structure.width.fold import fold_norms


class Reference(Protocol):
    """What a module must compute, on which inputs."""

    @property
    def inputs(self) -> Sequence[tuple[Any, ...]]: ...

    def wrong(self, model: nn.Module, *, folded: bool = False) -> str:
        """What is wrong with the outputs of ``model``, empty if nothing is."""


def cut_and_repair(
    model: nn.Module,
    cuts: Sequence[Cut],
    groups: Sequence[tuple[ChannelGroup, Bools]],
    reference: Reference,
    *,
    folded: bool = False,
    most: int | None = None,
) -> str:
    """Cut the modules of ``model`` **in place** and repair attributes; what is still wrong, empty if nothing is.

    Parameters
    ----------
    model : nn.Module
    cuts : sequence of Cut
    groups : sequence of (ChannelGroup, bool array)
        What ``cuts`` were planned for.
    reference : Reference
    folded : bool
        Whether constants were added to weights of ``model``, which rounds them.
    most : int, optional
        The largest number of repairs to try. Each is a run of the model up to where it fails.
    """
    apply_cuts(model, cuts)
    set_counts(model, groups)
    fold_norms(model, groups)
    refresh(model)  # what it keeps in evaluation has the old sizes
    wrong = reference.wrong(model, folded=folded)
    if not wrong:
        return ""
    for changes in itertools.islice(_candidates(model, groups, cuts, reference), most):
        with changed(changes) as keep:
            if not reference.wrong(model, folded=folded):
                keep()
                return ""
    return wrong


def _candidates(
    model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]], cuts: Sequence[Cut], reference: Reference
) -> Iterator[list[Change]]:
    """Changes to try, all with ``model`` as it was."""
    yield from repairs(model, groups, cuts)
    for fewest in (True, False):
        found = repairs_in_order(model, groups, cuts, lambda: outputs_of(model, reference.inputs[:1]), fewest=fewest)
        if found:
            yield found
