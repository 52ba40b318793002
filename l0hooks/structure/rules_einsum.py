"""The rule for ``einsum``: letters that operands share are batch axes or contracted, as in a matrix product."""

from __future__ import annotations

from torch import Tensor, fx

from l0hooks.structure.fx_nodes import argument, shape_of
from l0hooks.structure.table import rule
from l0hooks.structure.tracer import Tracer
from l0hooks.structure.union_find import along, varies

_DOTS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@rule("einsum")
def _einsum(t: Tracer, node: fx.Node) -> Tensor:
    operands: list[fx.Node] = list(argument(node, "tensors"))
    letters = _letters(argument(node, "equation"), [len(shape_of(one)) for one in operands])
    if letters is None or len(operands) > 2:
        return t.freeze_all(node, "einsum of another form than a product of two tensors")
    inputs, out = letters
    if len(operands) == 2:
        for (x, its), (weight, own) in (
            zip(operands, inputs, strict=True),
            zip(operands[::-1], inputs[::-1], strict=True),
        ):
            shared = set(its) & set(own)
            if t.is_weight(weight) and len(own) == 2 and len(shared) == 1 and not shared & set(out):
                read = own.index(next(iter(shared)))
                axes = t.axes(weight)
                t.read(node, weight, axes[read], t.collapse(x, its.index(next(iter(shared)))))
                return along(axes[1 - read], out.index(own[1 - read]), shape_of(node))
    return _product(t, node, [t.labels(one) for one in operands], inputs, out)


def _product(t: Tracer, node: fx.Node, labels: list[Tensor], inputs: list[str], out: str) -> Tensor:
    """Labels of a product of activations: what is summed freezes, batch axes couple."""
    parts = []
    for its, own in zip(labels, inputs, strict=True):
        summed = [axis for axis, letter in enumerate(own) if letter not in out]
        t.flatten(node, its, summed, "contracted in a product of two activations")
        part = its
        for axis in summed:
            part = part.narrow(axis, 0, 1)
        kept = [letter for letter in out if letter in own]
        part = part.permute(*summed, *(own.index(letter) for letter in kept))
        part = part.reshape(part.shape[len(summed) :])
        parts.append(part.reshape([part.shape[kept.index(letter)] if letter in kept else 1 for letter in out]))
    batch = [axis for axis, letter in enumerate(out) if all(letter in own for own in inputs)]
    t.freeze_broadcast(node, parts, batch)
    for part, own in zip(parts, inputs, strict=True):
        if len(inputs) > 1 and any(varies(t.classes.roots(part), axis) for axis in batch):
            free = [axis for axis, letter in enumerate(out) if letter in own and axis not in batch]
            t.flatten(node, part, free, "mixed within a head")
    found = t.combine(node, parts, shape_of(node))
    if len(inputs) > 1 and any(varies(t.classes.roots(found), axis) for axis in batch):
        t.heads.append(found)
    return found


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """The letters of the operands and of the result, an ellipsis as capitals; None if one has a letter twice."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow or any(letter in equation for letter in _DOTS):
        return None
    dots = [_DOTS[: rank - len(own.replace("...", ""))] for own, rank in zip(inputs, ranks, strict=True)]
    longest = max(dots, key=len)
    spelled = [own.replace("...", longest[len(longest) - len(d) :]) for own, d in zip(inputs, dots, strict=True)]
    out = right.replace("...", longest)
    twice = any(len(set(own)) < len(own) for own in (*spelled, out))
    return None if twice or not set(out) <= set("".join(spelled)) else (spelled, out)
