"""The recipe of a rewritten graph: the cuts and inputs that it was made from, so that it can be saved and made again.

The recipe stays with the graph through copies and pickles. ``torch.fx`` loses attributes of a ``GraphModule`` in one or
the other, but keeps the modules that the graph calls. So the first input passes through an ``nn.Identity`` that holds
the recipe as a string, and nothing of l0hooks is needed to unpickle the graph.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from l0hooks._files import typed
from l0hooks._torch.graphs import take_plain_arguments
from l0hooks._torch.trees import tree_map
from l0hooks.errors import InvalidValueError, StateError, UnsupportedModuleError, explain
from l0hooks.export.comparison import tolerance
from l0hooks.export.examples import attempt
from l0hooks.export.extra_state import DTYPES, made
from l0hooks.export.module_plan import ModulePlan, misfit, module_plan, shape_like, take_out
from l0hooks.export.outputs import difference
from l0hooks.structure.cut_graph import Free, Traced, rewrite
from l0hooks.structure.cut_modules import Cut, composed
from l0hooks.structure.graph_sizes import ITSELF, LEAST_TRACED, Place, Sizes, insert_checks

_ATTRIBUTE = "recipe"
_SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {"list": list, "tuple": tuple}


@dataclass(frozen=True)
class Recipe:
    """How a graph was made, as plain data.

    Attributes
    ----------
    modules : ModulePlan
        Of the model that was rewritten: earlier cuts may have made it smaller than the factory's.
    cuts : tuple of Cut
    inputs : tuple of dict
        The kinds of the example inputs.
    free : str
        Which sizes of the inputs may vary.
    at_one : tuple of places
        Which of them may be 1.
    """

    modules: ModulePlan
    cuts: tuple[Cut, ...]
    inputs: tuple[dict[str, Any], ...]
    free: Free
    at_one: tuple[Place, ...]


def rewrite_by(
    model: nn.Module,
    cuts: Sequence[Cut],
    example_inputs: Sequence[Any],
    free: Free = "all",
    at_one: Sequence[Place] | None = None,
    traced: Traced | None = None,
) -> tuple[fx.GraphModule, Sizes]:
    """The exported graph of ``model`` after ``cuts``, with its recipe, and the sizes of inputs that it takes.

    The graph checks the sizes of its inputs.

    Parameters
    ----------
    model : nn.Module
        Plain and uncut; not changed.
    cuts : sequence of Cut
    example_inputs : sequence
    free : "all", "batch" or "none"
        Which sizes of the inputs may vary.
    at_one : sequence of places, optional
        Which of them may be 1. If not given, both models are compared at these sizes.
    traced : pair, optional
        As for :func:`l0hooks.structure.cut_graph.rewrite`.

    Raises
    ------
    StateError
        If the graph cannot be rewritten.
    """
    graph_module, sizes = rewrite(model, cuts, example_inputs, free, traced)
    if at_one is None:
        at_one = equal_at_one(model, graph_module, sizes, example_inputs)
    sizes = sizes.with_least(at_one)
    insert_checks(graph_module, sizes)
    _insert(graph_module, json.dumps(_recipe(model, cuts, example_inputs, free, at_one)))
    take_plain_arguments(graph_module, model.forward)
    return graph_module, sizes


def _recipe(
    model: nn.Module, cuts: Sequence[Cut], example_inputs: Sequence[Any], free: Free, at_one: Sequence[Place]
) -> dict[str, Any]:
    """The recipe as plain data; of a graph that is cut again, the recipe that makes both cuts at once."""
    described = tuple(_described(value) for value in example_inputs)
    graphs_inside = any(_kept_recipe(module) for name, module in model.named_modules() if name)
    plan = {} if graphs_inside else dataclasses.asdict(module_plan(model))  # without a plan it is not saved
    earlier = _kept_recipe(model)
    if earlier is not None:
        plan = earlier["modules"]
        cuts = composed([typed(Cut, cut, "a recipe") for cut in earlier["cuts"]], cuts)
    made_by = {"cuts": [dataclasses.asdict(cut) for cut in cuts], "inputs": described, "free": free}
    return {"modules": plan, **made_by, "at_one": tuple(at_one)}


def equal_at_one(model: nn.Module, graph: nn.Module, sizes: Sizes, example_inputs: Sequence[Any]) -> list[Place]:
    """The places of free sizes that may be 1: both models compute the same there, for each alone and for all."""
    places = {free.first: [place for place, _, _ in free.places] for free in sizes.free if free.least == LEAST_TRACED}
    equal = [first for first in places if _equal(model, graph, example_inputs, places[first])]
    together = [place for first in equal for place in places[first]]
    return equal if _equal(model, graph, example_inputs, together) else []


def _equal(model: nn.Module, graph: nn.Module, example_inputs: Sequence[Any], places: Sequence[Place]) -> bool:
    """Whether both compute the same with size 1 at these places."""
    numbers = itertools.count()

    def first_ones(value: Any) -> Any:
        number = next(numbers)
        for n, axis in places:
            if n == number:
                value = 1 if axis == ITSELF else value.narrow(axis, 0, 1)
        return value

    inputs = tree_map(first_ones, tuple(example_inputs))
    expected, got = (attempt(one, inputs) for one in (model, graph))
    return expected is not None and got is not None and difference(expected, got) <= tolerance(model)


def rewrite_again(model: nn.Module, recipe: Recipe, where: str) -> fx.GraphModule:
    """The graph with this recipe, from a model like the one before all cuts, which is changed.

    Raises
    ------
    InvalidValueError
        If the recipe is not one for such a model.
    """
    inputs = [_made(one, where) for one in recipe.inputs]
    take_out(model, recipe.modules, where)
    shape_like(model, recipe.modules, where)
    for name, extra in recipe.modules.extra.items():
        model.get_submodule(name.rpartition(".")[0]).set_extra_state(made(extra, where))
    cut_names = [name for cut in recipe.cuts for name in cut.names]
    if len(set(cut_names)) < len(cut_names) or not all(cut.names for cut in recipe.cuts):
        raise InvalidValueError(explain(where, "a tensor must be cut once, by its name.", got=f"{cut_names}"[:80]))
    for cut in recipe.cuts:
        _check_cut(model, cut, where)
    try:
        return rewrite_by(model, recipe.cuts, inputs, recipe.free, recipe.at_one)[0]
    except (StateError, UnsupportedModuleError) as error:
        raise InvalidValueError(
            explain(where, "the graph must be rebuilt from the factory's model.", got=str(error).splitlines()[0])
        ) from error


def _check_cut(model: nn.Module, cut: Cut, where: str) -> None:
    """A cut must keep some indices, in order, of a tensor that the model has."""
    for name in cut.names:
        try:
            tensor = attrgetter(name)(model)
        except AttributeError as error:
            raise misfit(where, name, "a tensor of that name", "none") from error
        if tensor is not None and (not isinstance(tensor, Tensor) or tuple(tensor.shape) != cut.shape):
            raise misfit(where, name, f"shape {cut.shape}", getattr(tensor, "shape", type(tensor).__name__))
    if len({axis for axis, _ in cut.kept}) < len(cut.kept):
        raise misfit(where, cut.names[0], "each axis once", f"{[axis for axis, _ in cut.kept]}")
    for axis, kept in cut.kept:
        order = all(a < b for a, b in itertools.pairwise(kept))
        if not 0 <= axis < len(cut.shape) or not order or not kept or kept[0] < 0 or kept[-1] >= cut.shape[axis]:
            raise misfit(where, str(cut.names[:1]), f"indices of {cut.shape} in order", f"axis {axis}: {kept}"[:80])


def recipe_of(model: nn.Module) -> dict[str, Any] | None:
    """The cuts and the kinds of inputs that a graph was rewritten for, as plain data; None for any other model.

    Raises
    ------
    StateError
        If an input was neither a tensor nor a plain number or string.
    """
    recipe = _kept_recipe(model)
    if recipe is None:
        return None
    if not recipe["modules"]:
        raise StateError(
            explain(
                "save_pruned",
                "a rewritten graph is rebuilt from the modules of the factory's model.",
                got="one made from a pruned model some of whose modules were graphs",
                hint="torch.export.save; or all groups pruned at once",
            )
        )
    strange = next(filter(None, map(_strange, recipe["inputs"])), "")
    if strange:
        raise StateError(
            explain(
                "save_pruned",
                "a rewritten graph is rebuilt from tensors and plain numbers as inputs.",
                got=f"an example input of type {strange}",
                hint="torch.export.save",
            )
        )
    return recipe


def recipes_inside(model: nn.Module) -> dict[str, Any]:
    """The recipes of the modules of ``model`` that are graphs, by name; None for one that ``prune`` did not make.

    Raises
    ------
    StateError
        As :func:`recipe_of` does.
    """
    found: dict[str, Any] = {}
    for name, module in () if isinstance(model, fx.GraphModule) else model.named_modules():
        part = any(name.startswith(f"{graph}.") for graph in found)  # of another graph, such as a region of it
        if isinstance(module, fx.GraphModule) and not part:
            found[name] = recipe_of(module)
    return found


def _kept_recipe(model: nn.Module) -> dict[str, Any] | None:
    """The recipe that a graph holds; None for any other model."""
    recipes = [vars(child)[_ATTRIBUTE] for child in model.children() if _ATTRIBUTE in vars(child)]
    return json.loads(recipes[0]) if recipes and isinstance(model, fx.GraphModule) else None


def _strange(described: dict[str, Any]) -> str:
    """The type of an input that could not be described; empty if there is none."""
    parts = next((described[kind] for kind in _SEQUENCES if kind in described), ())
    return str(described.get("type", "")) or next(filter(None, map(_strange, parts)), "")


def _insert(graph_module: fx.GraphModule, recipe: str) -> None:
    """Let the first input that is used pass through a module that holds ``recipe``, **in place**."""
    graph = graph_module.graph
    source = next((node for node in graph.nodes if node.op == "placeholder" and node.users), None)
    if source is None:
        return
    name = _ATTRIBUTE
    while name in dict(graph_module.named_children()):
        name += "_"
    holder = nn.Identity()
    vars(holder)[_ATTRIBUTE] = recipe
    graph_module.add_submodule(name, holder)
    first_use = next(node for node in graph.nodes if source in node.all_input_nodes)
    with graph.inserting_before(first_use):
        passed = graph.call_module(name, (source,))
    source.replace_all_uses_with(passed, delete_user_cb=lambda user: user is not passed)
    graph_module.recompile()


def _described(value: Any) -> dict[str, Any]:
    """The kind of an input, as plain data."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"shape": list(value.shape), "dtype": dtype} if dtype in DTYPES else {"type": f"Tensor of {dtype}"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_described(part) for part in value]}
    return {"type": type(value).__name__}


def _made(described: Any, where: str) -> Any:
    """An input of that kind, all zeros: exporting needs its shape only."""
    if not isinstance(described, dict):
        raise InvalidValueError(explain(where, "an example input must be described.", got=repr(described)[:80]))
    shape, dtype, value = (described.get(key) for key in ("shape", "dtype", "value"))
    if set(described) == {"value"} and type(value) in (bool, int, float, str, type(None)):
        return value
    for kind, make in _SEQUENCES.items():
        if set(described) == {kind} and isinstance(described[kind], list):
            return make(_made(part, where) for part in described[kind])
    known = set(described) == {"shape", "dtype"} and isinstance(dtype, str) and dtype in DTYPES
    if not known or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise InvalidValueError(explain(where, "an example input must be of a known kind.", got=repr(described)[:80]))
    try:
        return torch.zeros(shape, dtype=DTYPES[str(dtype)])
    except (RuntimeError, OverflowError, TypeError) as error:
        raise InvalidValueError(
            explain(where, "an example input must fit into memory.", got=f"{shape}"[:80])
        ) from error
