"""Give an exported graph back the layers of its model, so that they train, and are found and replaced as before."""

from __future__ import annotations

import copy
from collections import defaultdict

from torch import Tensor, fx, nn

from l0hooks.structure.fx_nodes import called_by, name_of

_WITH_SIZES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "expand", "split", "chunk", "slice")


def keep_layers(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Let a graph call the layers of ``model`` where it holds the operator that such a call ran, **in place**.

    Layers are those of torch.nn that compute one operator. Called as modules, dropout drops in training mode, and batch
    norms use the batch.

    Parameters
    ----------
    graph_module : fx.GraphModule
        An exported graph of ``model`` that still says which module ran which operator.
    model : nn.Module
        Copies of its layers become parts of the graph module, with the same parameters.
    """
    layers = {name: module for name, module in model.named_modules() if name and _is_layer(module)}
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor) and called_by(node) in layers:
            calls[called_by(node)].append(node)
    for name, nodes in calls.items():
        if all(_is_whole_call(node, nodes) for node in nodes):
            graph_module.add_submodule(name, _copied(layers[name]))
            for node in nodes:
                _call_layer(node, name)
    for node in list(graph_module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph_module.graph.erase_node(node)


def _copied(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})


def _is_layer(module: nn.Module) -> bool:
    home = type(module).__module__
    return home.startswith("torch.nn.modules.") and next(module.children(), None) is None


def _is_whole_call(node: fx.Node, nodes: list[fx.Node]) -> bool:
    """Whether an operator is all that the call of a layer with one tensor ran."""
    together = {*node.all_input_nodes, *node.users}
    alone = together.isdisjoint(nodes) and len(_given(node)) == 1
    return alone and not name_of(node).startswith(_WITH_SIZES)


def _given(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.op != "get_attr"]


def _call_layer(node: fx.Node, name: str) -> None:
    with node.graph.inserting_before(node):
        call = node.graph.call_module(name, tuple(_given(node)))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)
