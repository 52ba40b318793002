"""``save_pruned`` and ``load_pruned``: a smaller model as one safetensors file, without pickle.

The file holds the tensors, and in its header a small JSON plan. Loading builds the dense model from the user's own
factory, gives a bias to the layers that got one from pruning, cuts every tensor to the size in the file, corrects the
modules' sizes, sets the attributes that pruning had to repair, and loads strictly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.modules import parameters_of
from l0hooks._torch.tensors import has_meta
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import InvalidValueError, StateError, explain
from l0hooks.export import safetensors_file as storage
from l0hooks.export.cut_groups import rewritten_from
from l0hooks.export.state import first_names, hidden_buffers, load_hidden, load_tensors, ties
from l0hooks.structure.cut_graph import rewrite
from l0hooks.structure.cut_modules import Cut, apply_cuts
from l0hooks.structure.layers import CONVOLUTIONS

_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def save_pruned(model: nn.Module, path: str | Path) -> None:
    """Write a pruned model to ``path``: its tensors and the plan to rebuild it.

    Parameters
    ----------
    model : nn.Module
        What :func:`l0hooks.prune` returned, perhaps trained on since; any plain model will do.
    path : str or Path
        Of the safetensors file.

    Raises
    ------
    StateError
        If the model still holds gates, is a rewritten graph, or stores sparse tensors.
    MissingExtraError
        If safetensors is not installed.

    Examples
    --------
    >>> import tempfile
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pruned(model, Path(folder) / "small.safetensors")
    ...     again = load_pruned(lambda: nn.Sequential(nn.Linear(4, 2)), Path(folder) / "small.safetensors")
    >>> torch.equal(model[0].weight, again[0].weight)
    True
    """
    _check_plain(model)
    state, hidden = first_names(model), hidden_buffers(model)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in {**state, **hidden}.items()}
    plan: dict[str, Any] = {
        "tied": {name: first for name, first in ties(model).items() if name != first},
        "hidden": sorted(hidden),
        "attributes": _integers(model),
        "biases": sorted(name for name in model.state_dict() if name.rpartition(".")[2] == "bias"),
        "graph": _graph_plan(model),
    }
    storage.write(tensors, plan, path)


def load_pruned(factory: Callable[[], nn.Module], path: str | Path) -> nn.Module:
    """Rebuild a model that :func:`save_pruned` wrote.

    Parameters
    ----------
    factory : callable
        Builds the dense model, as it was before pruning. On the meta device that takes no memory; the model then holds
        the tensors of the file themselves, on the CPU.
    path : str or Path

    Returns
    -------
    nn.Module
        In the mode that ``factory`` leaves it in.

    Raises
    ------
    InvalidValueError
        If the file is damaged, not one of ours, or does not fit the factory's model.
    MissingExtraError
        If safetensors is not installed.

    Examples
    --------
    >>> import tempfile
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
    tensors, plan = storage.read(Path(path))
    model = factory()
    _give_biases(model, plan.get("biases", []), path)
    if plan["graph"] is not None:
        _refuse_graph_on_meta(model, path)
        cuts = [
            Cut(tuple(n), tuple(shape), tuple((d, tuple(k)) for d, k in kept))
            for n, shape, kept in plan["graph"]["cuts"]
        ]
        model = rewrite(model, cuts, _made_inputs(plan["graph"]["inputs"]))
    hidden = {name: tensors.pop(name) for name in plan["hidden"]}
    names = ties(model)
    expected = set(first_names(model))
    if expected != set(tensors) or any(names[name] != first for name, first in plan["tied"].items() if name in names):
        raise InvalidValueError(
            explain(
                f"load_pruned {path}",
                "the file must hold the tensors of the factory's model.",
                expected=f"also {sorted(expected - set(tensors))[:4]}",
                got=f"besides {sorted(set(tensors) - expected)[:4]}",
                hint="the factory that built the model before it was pruned",
            )
        )
    apply_cuts(model, [_cut(name, old, tensors[name], names, path) for name, old in first_names(model).items()])
    load_hidden(model, hidden)
    modules = dict(model.named_modules())
    for module_name, attribute, value in plan["attributes"]:
        own: dict[str, Any] = modules[module_name].__dict__ if module_name in modules else {}
        if type(own.get(attribute)) is int:
            own[attribute] = value
    load_tensors(model, tensors, names, path)
    return model


def _refuse_graph_on_meta(model: nn.Module, path: str | Path) -> None:
    """The constants of a graph are not in the file."""
    if has_meta(model):
        raise InvalidValueError(
            explain(
                f"load_pruned {path}",
                "a rewritten graph is made from a model that has data.",
                got="a factory that builds on the meta device",
                hint="a factory that builds the model with data",
            )
        )


def _integers(model: nn.Module) -> list[tuple[str, str, int]]:
    """The integers that modules know themselves by, as (module, attribute, value): pruning may have changed any."""
    if isinstance(model, torch.fx.GraphModule):
        return []
    return [
        (name, attribute, value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if type(value) is int
    ]


def _give_biases(model: nn.Module, biases: object, path: str | Path) -> None:
    """Zeros for the layers of the factory's model that have no bias and got one from the channels cut before them."""
    if not isinstance(biases, list) or not all(isinstance(name, str) for name in biases):
        raise InvalidValueError(
            explain(f"load_pruned {path}", "the plan must list the biases of the model by name.", got=repr(biases)[:80])
        )
    modules = dict(model.named_modules())
    for name in biases:
        module = modules.get(name.rpartition(".")[0])
        weight = None if module is None else parameters_of(module).get("weight")
        if module is None or weight is None or not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            continue
        if module.bias is None:
            module.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)


def _graph_plan(model: nn.Module) -> dict[str, Any] | None:
    """How to rewrite the dense model's graph again; None for a model of modules."""
    recipe = rewritten_from(model)
    if recipe is None:
        return None
    cuts, inputs = recipe
    described: list[dict[str, Any]] = []
    for value in inputs:
        if isinstance(value, Tensor):
            described.append({"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")})
        elif value is None or isinstance(value, (bool, int, float, str)):
            described.append({"value": value})
        else:
            raise StateError(
                explain(
                    "save_pruned",
                    "a rewritten graph is rebuilt from tensors and plain numbers as inputs.",
                    got=f"an example input of type {type(value).__name__}",
                    hint="torch.export.save",
                )
            )
    return {"cuts": [(cut.names, cut.shape, cut.kept) for cut in cuts], "inputs": described}


def _made_inputs(described: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Inputs of the kind that were given, all zeros: exporting needs their shapes only."""
    dtypes: dict[str, torch.dtype] = {str(d).removeprefix("torch."): d for d in _DTYPES}
    return tuple(torch.zeros(d["shape"], dtype=dtypes[d["dtype"]]) if "shape" in d else d["value"] for d in described)


def _check_plain(model: nn.Module) -> None:
    got = None
    if has_meta(model):
        got = "parameters on the meta device, which have no data"
    elif next(iter_gated(model), None) is not None:
        got = "a model with gates: prune it first"
    elif isinstance(model, torch.fx.GraphModule) and rewritten_from(model) is None:
        got = "a graph that prune did not return in this process: torch.export.save it"
    elif any(tensor.layout != torch.strided for tensor in model.state_dict().values() if isinstance(tensor, Tensor)):
        got = "sparse tensors: prune without sparse_format"
    if got is not None:
        raise StateError(explain("save_pruned", "the model must be plain and dense.", got=got))


def _cut(name: str, old: Tensor, new: Tensor, names: dict[str, str], path: str | Path) -> Cut:
    """A cut that gives ``old`` the shape of ``new``; which indices stay does not matter, their values are loaded."""
    if (
        old.dim() != new.dim()
        or any(a < b for a, b in zip(old.shape, new.shape, strict=True))
        or old.dtype != new.dtype
    ):
        raise InvalidValueError(
            explain(
                f"load_pruned {path}",
                f"{name!r} must fit the factory's model.",
                expected=f"at most {tuple(old.shape)}, {old.dtype}",
                got=f"{tuple(new.shape)}, {new.dtype}",
                hint="the factory that built the model before it was pruned",
            )
        )
    kept = tuple((d, tuple(range(n))) for d, n in enumerate(new.shape) if n != old.shape[d])
    return Cut(tuple(n for n, first in names.items() if first == name), tuple(old.shape), kept)
