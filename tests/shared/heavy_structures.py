"""Which structures of the zoo are left to the slow tests, and what of laws and zoo runs on the oldest torch."""

from __future__ import annotations

import pytest
from parameters import OLDEST

# Each takes seconds, and others of its kind do not: HFGPT2 of transformers; MultiQuery, ZeroBias and
# InPlace of those that are cut as graphs. ``.ci/run`` runs them from end to end on the oldest torch, too.
HEAVY = {
    *("C2f", "ComplexRotation", "CrossAttention", "OneMaskForAllHeads", "PlainAttention", "RotaryAttention"),
    *("TransformerEncoder", "ViT", "VGGWithView", "HFBertEager", "HFBertSdpa", "HFConvNeXt", "HFDistilBert", "HFLlama"),
    *("HFMobileNetV2", "HFResNet", "HFSwin", "HFT5"),
    *("Mixtral", "Olmoe", "a list"),  # of experts
}
# what the zoo shows of each structure on the oldest torch: gated, trained for a step, cut, and compared
FROM_END_TO_END = ("from_a_dense_model", "computes_what_the_gated_one_does", "closed_channels_are_cut_out")
GATED_BY_LAYER = {"bert", "gpt2", "llama", "vit"}  # those that take seconds to cut; one of their cuts is fast


def mark_heavy(items: list[pytest.Item]) -> None:
    """Mark the tests of heavy structures."""
    for item in items:
        callspec = vars(item).get("callspec")  # of tests with parameters alone
        if callspec is None or item.path.parent.name != "zoo" or item.get_closest_marker("slow"):
            continue
        name, case = callspec.params.get("name"), callspec.params.get("case")
        is_cut = case is not None and "closed_channels_are_cut_out" in item.name
        if name in HEAVY or (is_cut and case[0] in GATED_BY_LAYER and case != ("gpt2", "input")):
            for mark in OLDEST if "from_a_dense_model" in item.name or is_cut else (pytest.mark.slow,):
                item.add_marker(mark)


def mark_oldest(items: list[pytest.Item]) -> None:
    """Mark the fast laws, and the fast structures of the zoo that go from end to end."""
    for item in items:
        room = item.path.parent.name
        if item.get_closest_marker("slow") is None and (
            room == "laws" or (room == "zoo" and any(part in item.name for part in FROM_END_TO_END))
        ):
            item.add_marker(pytest.mark.oldest)
