"""Norms over the channels of a stream in an exported graph: torch's own, and RMSNorm written out by a module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from l0hooks.structure.fx_nodes import argument, called_by, name_of, shape_of
from l0hooks.structure.settings import epsilons
from l0hooks.structure.width.parts import NormKind

_CASTS = ("to", "_to_copy", "type_as", "float", "alias", "clone", "contiguous")
_TORCH: dict[str, tuple[NormKind, type[nn.Module]]] = {
    "layer_norm": ("layer", nn.LayerNorm),
    "rms_norm": ("rms", nn.RMSNorm),
    "group_norm": ("group", nn.GroupNorm),
}
_OTHER_USE = "its mean square is used otherwise than in an RMSNorm"
_NO_WEIGHT = "normalised by a norm without a weight, into which its new size could be folded"


@dataclass(frozen=True)
class Norm:
    """A norm in a graph.

    Attributes
    ----------
    kind : "layer", "rms" or "group"
    module : str
        Qualified name of the module that computes it.
    epsilon : str
        The module's attribute that holds ε.
    node : fx.Node
        Where channels meet: the norm itself, or the mean of squares.
    x : fx.Node
        What is normalised.
    result : fx.Node
    weight, bias : fx.Node or None
        Parameters; without a bias None.
    inner : frozenset of fx.Node
        All operators of the norm.
    offset : float
        Added to the weight.
    """

    kind: NormKind
    module: str
    epsilon: str
    node: fx.Node
    x: fx.Node
    result: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    inner: frozenset[fx.Node]
    offset: float = 0.0

    @property
    def axis(self) -> int:
        """The axis of the channels."""
        return 1 if self.kind == "group" else -1


def find_norms(model: nn.Module, program: torch.export.ExportedProgram) -> dict[fx.Node, Norm | str]:
    """The norms of a graph by the operator where channels meet; for one that is not certain the reason.

    Parameters
    ----------
    model : nn.Module
        The model that was exported.
    program : ExportedProgram

    Returns
    -------
    dict from fx.Node to Norm or str
    """
    names = program.graph_signature.inputs_to_parameters
    parameters = {node: names[node.name] for node in program.graph.nodes if node.name in names}
    found: dict[fx.Node, Norm | str] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if name_of(node) in _TORCH:
            norm = _of_torch(model, parameters, node)
        elif name_of(node) == "mean":
            norm = _written_out(model, parameters, node)
        else:
            continue
        if norm is not None:
            found[node] = norm
    return found


def _of_torch(model: nn.Module, parameters: Mapping[fx.Node, str], node: fx.Node) -> Norm | str | None:
    """A call of LayerNorm, RMSNorm or GroupNorm; None for what normalises over other axes."""
    name = name_of(node)
    kind, layer = _TORCH[name]
    if (argument(node, "num_groups") if kind == "group" else len(argument(node, "normalized_shape"))) != 1:
        return None
    path = _module_of(node)
    module = model.get_submodule(path)
    if type(module).forward is not layer.forward:
        return f"normalised by {name} in a module with code of its own"
    weight = argument(node, "weight")
    bias = None if kind == "rms" else argument(node, "bias")
    if weight is None:
        return _NO_WEIGHT
    if not all(one is None or one in parameters for one in (weight, bias)):
        return f"normalised by {name} with a computed weight"
    return Norm(kind, path, "eps", node, argument(node, "input"), node, weight, bias, frozenset((node,)))


def _written_out(model: nn.Module, parameters: Mapping[fx.Node, str], node: fx.Node) -> Norm | str | None:
    """x·rsqrt(mean(x²) + ε)·w over the last axis; None for a mean that is no part of that."""
    squares, rank = node.args[0], len(shape_of(node.args[0]))
    dims, keeps = argument(node, "dim"), argument(node, "keepdim")
    if not isinstance(squares, fx.Node) or dims is None or [d % rank for d in dims] != [rank - 1] or not keeps:
        return None
    x = _squared(squares)
    if x is None:
        return None
    shifted = _only_user(node)
    if shifted is None or name_of(shifted) != "add" or not isinstance(shifted.args[1], float):
        return _OTHER_USE
    root = _only_user(shifted)
    if root is None or not _is_inverse_root(root):
        return _OTHER_USE
    scaled = _only_user(root)
    if scaled is None or name_of(scaled) != "mul" or root not in scaled.args or _only_user(squares) is not node:
        return _OTHER_USE
    (other,) = [one for one in scaled.args if one is not root] or [root]
    if not isinstance(other, fx.Node) or _source(other) is not _source(x):
        return _OTHER_USE
    weighted = _weighted(parameters, scaled)
    if weighted is None:
        return _NO_WEIGHT
    result, weight, offset, inner = weighted
    path = _module_of(node)
    held = [name for name, value in epsilons(model.get_submodule(path)) if value == shifted.args[1]]
    if len(held) != 1:
        return f"normalised by an RMSNorm whose module does not hold its epsilon, {shifted.args[1]:g}, once"
    nodes = frozenset((squares, node, shifted, root, scaled, result, *inner))
    return Norm("rms", path, held[0], node, x, result, weight, None, nodes, offset)


def _squared(node: fx.Node) -> fx.Node | None:
    """What ``node`` is the square of."""
    name, args = name_of(node), node.args
    square = name == "square" or (name == "pow" and args[1] == 2) or (name == "mul" and args[0] is args[-1])
    return args[0] if square and isinstance(args[0], fx.Node) else None


def _is_inverse_root(node: fx.Node) -> bool:
    return name_of(node) == "rsqrt" or (name_of(node) == "pow" and bool(node.args[1] == -0.5))


def _weighted(
    parameters: Mapping[fx.Node, str], scaled: fx.Node
) -> tuple[fx.Node, fx.Node, float, tuple[fx.Node, ...]] | None:
    """The product with the weight that follows, the weight, its offset, and the operators on the way."""
    last, inner = scaled, []
    user = _only_user(last)
    while user is not None and name_of(user) in _CASTS:
        inner.append(user)
        last, user = user, _only_user(user)
    if user is None or name_of(user) != "mul":
        return None
    others = [one for one in user.args if one is not last]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    node, offset = others[0], 0.0
    while node not in parameters:
        name = name_of(node) if node.op == "call_function" else ""
        inner.append(node)
        constants = [one for one in node.args if isinstance(one, (int, float))]
        if name == "add" and len(node.args) == 2 and len(constants) == 1 and not node.kwargs:
            offset += constants[0]
        elif name not in _CASTS:
            return None
        (node, *_) = node.all_input_nodes or [node]
        if node in inner:
            return None
    return (user, node, offset, tuple(inner)) if len(shape_of(node)) == 1 else None


def used_by(node: fx.Node) -> Iterator[fx.Node]:
    """The operators that use a node, without checks of its dtype."""
    return (user for user in node.users if user.op != "call_function" or user.meta.get("val") is not None)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(used_by(node))
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _source(node: fx.Node) -> fx.Node:
    """The node itself before its dtype was changed."""
    while node.op == "call_function" and name_of(node) in _CASTS:
        node = node.all_input_nodes[0]
    return node


def _module_of(node: fx.Node) -> str:
    return re.sub(r"@\d+", "", called_by(node))
