"""``save_pruned`` and ``load_pruned``: a smaller model as one safetensors file, without pickle.

The file holds the tensors, and a small JSON plan in its header. Loading builds the dense model with the user's factory,
adds the biases that pruning added, cuts every tensor to its size in the file, corrects the sizes and attributes of the
modules, and loads the tensors strictly: those of the state, and buffers and attributes outside it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from l0hooks._files import typed
from l0hooks._torch.tensors import has_meta, is_meta
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import InvalidValueError, explain
from l0hooks.export import safetensors_file as storage
from l0hooks.export.extra_state import made
from l0hooks.export.module_plan import ModulePlan, check_names, misfit, module_plan, remove_lost, shape_like
from l0hooks.export.recipe import Recipe, recipe_of, recipes_inside, rewrite_again
from l0hooks.export.savable import check_savable
from l0hooks.export.state import first_names, hidden_tensors, load_tensors, put_hidden, ties
from l0hooks.structure.cut_modules import replace_module


def save_pruned(model: nn.Module, path: str | Path) -> None:
    """Write a pruned model to ``path``: its tensors and the plan to rebuild it.

    Buffers and attributes that are tensors outside the state are written, too, and what modules return from
    ``get_extra_state``. A file that is there already is replaced by a whole one, or stays.

    Parameters
    ----------
    model : nn.Module
        What :func:`l0hooks.prune` returned, also if it was copied, pickled or trained since; or any plain model.
    path : str or Path
        The safetensors file to write.

    Raises
    ------
    StateError
        If the model still holds gates, is a graph that ``prune`` did not make or TorchScript, stores sparse tensors, or
        has no data, or an extra state that is no plain data.
    MissingExtraError
        If safetensors is not installed.

    Examples
    --------
    >>> import tempfile, torch
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pruned(model, Path(folder) / "small.safetensors")
    ...     again = load_pruned(lambda: nn.Sequential(nn.Linear(4, 2)), Path(folder) / "small.safetensors")
    >>> torch.equal(model[0].weight, again[0].weight)
    True
    """
    check_savable(model)
    recipe = recipe_of(model)
    state, hidden = first_names(model), hidden_tensors(model)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in {**state, **hidden}.items()}
    tied = {name: first for name, first in ties(model).items() if name != first}
    plan = {
        "tied": tied,
        "hidden": sorted(hidden),
        "modules": None if recipe is not None else dataclasses.asdict(module_plan(model)),
        "graph": recipe,
        "inside": recipes_inside(model),
    }
    storage.write(tensors, plan, path)


def load_pruned(factory: Callable[[], nn.Module], path: str | Path) -> nn.Module:
    """Rebuild a model that :func:`save_pruned` wrote.

    Parameters
    ----------
    factory : callable
        Builds the dense model as it was before pruning. On the meta device that takes no memory; the loaded model then
        holds the tensors of the file, on the CPU.
    path : str or Path
        A file that :func:`save_pruned` wrote.

    Returns
    -------
    nn.Module
        In training or evaluation mode, as ``factory`` returned it.

    Raises
    ------
    InvalidValueError
        If the file is damaged, was not written by :func:`save_pruned`, or does not fit the factory's model, in its
        tensors or in settings of torch's layers such as kernel sizes and strides.
    MissingExtraError
        If safetensors is not installed.

    Warns
    -----
    UserWarning
        If the file and the factory's model do not have the same tensors outside the state.

    Examples
    --------
    >>> import tempfile, torch
    >>> from l0hooks import iter_gates, prune, sparsify
    >>> factory, x = (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), torch.ones(2, 4)
    >>> model = factory()
    >>> _ = sparsify(model, "coupled", example_inputs=(x,))
    >>> _ = [gate.log_alpha.data[:3].fill_(-9.0) for _, gate in iter_gates(model)]  # in place of training
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pruned(prune(model, example_inputs=(x,)), Path(folder) / "small.safetensors")
    ...     load_pruned(factory, Path(folder) / "small.safetensors")
    Sequential(
      (0): Linear(in_features=4, out_features=5, bias=True)
      (1): ReLU()
      (2): Linear(in_features=5, out_features=2, bias=True)
    )
    """
    _check_factory(factory, path)
    where = f"load_pruned {path}"
    tensors, raw = storage.read(Path(path))
    plan: _Plan = typed(_Plan, {"inside": {}, **raw}, where)  # older files know of no graphs inside
    if (plan.modules is None) == (plan.graph is None):
        raise InvalidValueError(
            explain(where, "the plan must be that of modules or of a graph.", got="both or neither")
        )
    _check_tensors(tensors, plan, where)
    model = _built(factory, where)
    extra: dict[str, Any] = {}
    if plan.modules is not None:
        extra = {name: made(described, where) for name, described in plan.modules.extra.items()}
        remove_lost(model, plan.modules, where)  # names of modules inside are those without them
        _rewrite_inside(model, plan.inside, where)
        shape_like(model, plan.modules, where)
    elif plan.graph is not None:
        _refuse_graph_on_meta(model, where)
        model = rewrite_again(model, plan.graph, where)
    hidden = {name: tensors.pop(name) for name in plan.hidden}
    _check_fit(model, tensors, plan, where)
    _replace_hidden(model, hidden, where)
    load_tensors(model, tensors, ties(model), extra, where)
    return model


@dataclass(frozen=True)
class _Plan:
    """The plan of a file; exactly one of ``modules`` and ``graph`` is given. ``inside`` are modules that are graphs."""

    tied: dict[str, str]
    hidden: tuple[str, ...]
    modules: ModulePlan | None
    graph: Recipe | None
    inside: dict[str, Recipe]


def _rewrite_inside(model: nn.Module, recipes: dict[str, Recipe], where: str) -> None:
    """Make these modules graphs again, **in place**."""
    if recipes:
        _refuse_graph_on_meta(model, where)
    for name, recipe in recipes.items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise misfit(where, name, "a module of that name", "none") from error
        graph = rewrite_again(module, recipe, f"{where} at {name!r}")
        replace_module(model, module, graph.train(module.training))


def _check_factory(factory: object, path: str | Path) -> None:
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InvalidValueError(
            explain(
                "load_pruned",
                "the first argument must be a function that builds the dense model anew.",
                expected="load_pruned(factory, path)",
                got=f"a {type(factory).__name__}",
                hint=f"load_pruned(lambda: {type(factory).__name__}(...), {str(path)!r})",
            )
        )


def _built(factory: Callable[[], nn.Module], where: str) -> nn.Module:
    model = factory()
    got = None
    if not isinstance(model, nn.Module):
        got = f"a {type(model).__name__}"
    elif next(iter_gated(model), None) is not None:
        got = "a model with gates"
    if got is not None:
        raise InvalidValueError(
            explain(where, "the factory must return the dense model as it was before sparsify.", got=got)
        )
    return model


def _check_tensors(tensors: dict[str, Tensor], plan: _Plan, where: str) -> None:
    """The tensors of the file must be those that its plan speaks of."""
    hidden = set(plan.hidden)
    known = set(tensors) if plan.modules is None else {*plan.modules.shapes, *plan.modules.hidden}
    described = {} if plan.modules is None else {**plan.modules.shapes, **plan.modules.hidden}
    wrong = set(tensors) ^ known | hidden - set(tensors)
    wrong |= {name for name in hidden if plan.hidden.count(name) > 1}
    wrong |= {name for name, shape in described.items() if name in tensors and tuple(tensors[name].shape) != shape}
    if plan.modules is not None:
        wrong |= hidden ^ set(plan.modules.hidden)
    if wrong:
        raise InvalidValueError(
            explain(where, "the plan must describe the tensors of the file.", got=f"others for {sorted(wrong)[:4]}")
        )


def _check_fit(model: nn.Module, tensors: dict[str, Tensor], plan: _Plan, where: str) -> None:
    """The tensors of the file must be those of the model, in name, shape, dtype and ties."""
    own, names = first_names(model), ties(model)
    check_names(set(tensors), set(own), where)
    for name, old in own.items():
        new = tensors[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            expected, got = (f"{tuple(t.shape)}, {t.dtype}" for t in (old, new))
            raise misfit(where, name, expected, got)
    for name, first in plan.tied.items():
        if names.get(name, first) != first:
            raise misfit(where, name, f"tied to {names[name]!r}", f"tied to {first!r}")


def _replace_hidden(model: nn.Module, hidden: dict[str, Tensor], where: str) -> None:
    """Put back what the state leaves out, and say what the file and the factory's model do not both have."""
    built = [name for name, tensor in hidden_tensors(model).items() if name not in hidden and not is_meta(tensor)]
    left = put_hidden(model, hidden)
    for names, what in (
        (left, "left out: the model has no place for them"),
        (built, "as the factory built them"),
    ):
        if names:
            message = explain(
                where,
                "the file and the model should have the same tensors outside the state.",
                got=f"{', '.join(names[:4])}: {what}",
                hint="the version of the model's code that wrote the file",
            )
            warnings.warn(message, stacklevel=3)


def _refuse_graph_on_meta(model: nn.Module, where: str) -> None:
    """Exporting needs the numbers that the graph holds."""
    if has_meta(model):
        raise InvalidValueError(
            explain(
                where,
                "a rewritten graph is made from a model that has data.",
                got="a factory that builds on the meta device",
                hint="a factory that builds the model with data",
            )
        )
