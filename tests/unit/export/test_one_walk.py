"""``prune`` walks a model once and hands on what it found."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from structure_models import ZOO

import l0hooks
from l0hooks import iter_gates, prune, sparsify

PACKAGE = str(Path(l0hooks.__file__).parent)
GENERATOR = 0x20  # the flag of a code object
MOST_CHANGES = 360


def files_entered(run):
    """The file of every function of l0hooks that ``run`` enters, in order.

    Comprehensions, generator expressions and lambdas count as parts of their function; a generator counts when it
    starts, and not when it goes on.
    """
    files = []

    def note(frame, event, arg):
        code = frame.f_code
        goes_on = code.co_flags & GENERATOR and frame.f_lasti > 2
        ours = code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<")
        if event == "call" and ours and not goes_on:
            files.append(code.co_filename)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize("training", [True, False])
def test_pruning_a_resnet_of_two_blocks_seldom_changes_file(training):
    entry = ZOO["ResNetBasic"]
    model, inputs = entry.make(), entry.inputs()
    sparsify(model, "coupled", example_inputs=inputs)
    for _, gate in iter_gates(model):
        gate.log_alpha.data[:2] = -4.0
    model.train(training)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (prune(model, example_inputs=inputs), entry.make())]
    assert sizes[0] < sizes[1]
    files = files_entered(lambda: prune(model, example_inputs=inputs))
    assert sum(a != b for a, b in itertools.pairwise(files)) <= MOST_CHANGES


def test_a_change_of_file_is_counted():
    model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    sparsify(model, "output")
    files = files_entered(lambda: prune(model))
    assert {Path(file).name for file in files} >= {"_prune.py", "walk.py", "gated_weight.py", "modules.py"}
