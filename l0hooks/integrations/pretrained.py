"""Pruned models of transformers in folders that ``from_pretrained`` loads."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from l0hooks.attach.walk import iter_gated
from l0hooks.errors import InvalidValueError, StateError, explain, import_extra, in_one_line
from l0hooks.export import load_pruned, save_pruned
from l0hooks.export.comparison import tolerance
from l0hooks.export.outputs import difference, outputs_of
from l0hooks.export.safetensors_file import floating_dtypes
from l0hooks.integrations.config_sizes import Number, sized_config, with_epsilons
from l0hooks.structure.example_inputs import ExampleInputs, positional

if TYPE_CHECKING:
    import transformers
    from transformers import PreTrainedModel
else:
    transformers = import_extra("transformers", extra="transformers", where="l0hooks.integrations.transformers")
    PreTrainedModel = transformers.PreTrainedModel

_WITH_PLAN = "l0hooks.safetensors"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")  # of an earlier model in the folder


class Savable(Protocol):
    """A tokenizer or processor."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write its files."""
        ...


@dataclass(frozen=True)
class SavedPretrained:
    """What :func:`save_pretrained` wrote.

    Attributes
    ----------
    folder : Path
    plain : bool
        Whether ``from_pretrained`` of transformers loads it; else :func:`from_pretrained` of this module does.
    config : mapping from a name to (number or None, number)
        Numbers of the config that were changed: before, and now.
    why : str
        Why plain transformers cannot load it; empty if it can.

    Examples
    --------
    >>> print(SavedPretrained(Path("small"), plain=True, config={"intermediate_size": (3072, 1536)}))
    small: from_pretrained of transformers loads it; intermediate_size 3072 → 1536
    """

    folder: Path
    plain: bool
    config: Mapping[str, tuple[Number | None, Number]] = field(default_factory=dict)
    why: str = ""

    def __str__(self) -> str:
        if not self.plain:
            return f"{self.folder}: l0hooks.integrations.transformers.from_pretrained loads it, because {self.why}"
        numbers = ", ".join(f"{name} {old} → {new}" for name, (old, new) in self.config.items())
        return f"{self.folder}: from_pretrained of transformers loads it" + (f"; {numbers}" if numbers else "")


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    example_inputs: ExampleInputs,
    tokenizer: Savable | None = None,
) -> SavedPretrained:
    """Write a pruned model of transformers so that it loads where it came from.

    If the config has numbers for all sizes, they are set, and ``from_pretrained`` of plain transformers loads the
    folder. ``Budget(uniform=True)`` makes sizes that a config can say. Other sizes need the plan of the cuts: then the
    folder holds the dense config and the plan, and :func:`from_pretrained` of this module loads it. Either way what
    was written is loaded, and its outputs are compared, before it takes its place.

    Parameters
    ----------
    model : PreTrainedModel
        What :func:`l0hooks.prune` returned. Not changed.
    folder : str or Path
        Weights of an earlier model in it are replaced.
    example_inputs : sequence or mapping
        Arguments of ``model``, on which both models are compared.
    tokenizer : tokenizer or processor, optional
        Written into the same folder.

    Returns
    -------
    SavedPretrained
        Prints which of the two it is, and what was changed or why.

    Raises
    ------
    InvalidValueError
        If ``model`` is no model of transformers.
    StateError
        If ``model`` holds gates, or what was written computes something else. The folder stays as it was.

    Examples
    --------
    >>> import tempfile, torch
    >>> from transformers import AutoModel, BertConfig, BertModel
    >>> from l0hooks import Budget, GateSpec, prune, sparsify
    >>> size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    >>> model, inputs = BertModel(BertConfig(**size)), (torch.randint(50, (2, 7)),)
    >>> budget = Budget(sparsity=0.1, unit="params", steps=0, uniform=True, round_to=8)
    >>> spec = GateSpec(granularity="coupled", kinds=("neuron",))
    >>> _ = sparsify(model, spec, example_inputs=inputs, budget=budget, exclude="pooler")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = save_pretrained(prune(model, example_inputs=inputs), folder, example_inputs=inputs)
    ...     again = AutoModel.from_pretrained(folder)
    >>> saved.plain, saved.config, again.config.intermediate_size
    (True, {'intermediate_size': (32, 8)}, 8)
    """
    if not isinstance(model, PreTrainedModel):
        raise InvalidValueError(
            explain(
                "save_pretrained",
                "the model must be one of transformers.",
                got=type(model).__name__,
                hint="l0hooks.save_pruned, for graphs and other models",
            )
        )
    if next(iter_gated(model), None) is not None:
        raise StateError(
            explain("save_pretrained", "the model must be pruned.", got="gates", hint="l0hooks.prune(model, ...) first")
        )
    folder, examples = Path(folder), positional(model, example_inputs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".l0hooks-") as temporary:
        written = Path(temporary)
        saved = _saved_plain(model, written, examples, folder)
        if isinstance(saved, str):
            _save_with_plan(model, written, examples)
            saved = SavedPretrained(folder, False, why=saved)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(written))
        _replace(folder, written)
    return saved


def from_pretrained(folder: str | Path) -> PreTrainedModel:
    """A pruned model from a folder that :func:`save_pretrained` wrote, in evaluation mode.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    PreTrainedModel

    Raises
    ------
    InvalidValueError
        If the folder holds no such model, or names a class that transformers does not have.

    Examples
    --------
    >>> import tempfile, torch
    >>> from transformers import BertConfig, BertModel
    >>> size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     inputs = (torch.randint(50, (2, 7)),)
    ...     _ = save_pretrained(BertModel(BertConfig(**size)), folder, example_inputs=inputs)
    ...     type(from_pretrained(folder)).__name__
    'BertModel'
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InvalidValueError(
            explain(
                "from_pretrained",
                "the folder must hold a model.",
                expected="config.json",
                got=f"{folder}, without it",
                hint="l0hooks.integrations.transformers.save_pretrained(model, folder, ...)",
            )
        )
    config = transformers.AutoConfig.from_pretrained(folder)
    names = getattr(config, "architectures", None) or [""]
    kind: Any = getattr(transformers, names[0], None)
    if kind is None:
        raise InvalidValueError(
            explain(
                "from_pretrained",
                "the class in config.json must be one of transformers.",
                got=names[0] or "none",
                hint=f"l0hooks.load_pruned(lambda: YourClass(config), folder / {_WITH_PLAN!r})",
            )
        )
    if not (folder / _WITH_PLAN).is_file():
        plain: PreTrainedModel = kind.from_pretrained(folder)
        return plain
    path = folder / _WITH_PLAN
    model: Any = load_pruned(lambda: _with_dtypes(kind(config), floating_dtypes(path)), path).eval()
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model  # type: ignore[no-any-return]


def _saved_plain(
    model: PreTrainedModel, written: Path, examples: tuple[Any, ...], folder: Path
) -> SavedPretrained | str:
    """Write with a config that says the sizes, and load it by transformers; why not, if that gives no such model."""
    found = with_epsilons(sized_config(model), model)
    if found.wrong:
        more = f" and {len(found.wrong) - 1} more" if len(found.wrong) > 1 else ""
        return f"no number of its config says the shape of {found.wrong[0]}{more}"
    before = model.config
    try:
        model.config = found.config
        model.save_pretrained(written)
        gap = _difference(model, type(model).from_pretrained(written), examples)
        why = "" if gap <= tolerance(model) else "its config says the sizes, and its class computes something else then"
    except Exception as error:  # noqa: BLE001  # the class's own checks can raise anything for such a config
        why = f"transformers refuses a config of its sizes: {' '.join(str(error).split())}"
    finally:
        model.config = before
    if not why:
        return SavedPretrained(folder, True, {name: (old, new) for name, old, new in found.changes})
    for path in written.iterdir():
        path.unlink()
    return why


def _save_with_plan(model: PreTrainedModel, written: Path, examples: tuple[Any, ...]) -> None:
    """Write the dense config and the plan, and load them.

    Raises
    ------
    StateError
        If what is loaded is another model.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(written)
    save_pruned(model, written / _WITH_PLAN)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(written)
    try:
        gap = _difference(model, from_pretrained(written), examples)
        got, right = f"a difference of {gap:.1e} of the output's scale", gap <= tolerance(model)
    except (InvalidValueError, StateError) as error:
        got, right = in_one_line(error), False
    if not right:
        raise StateError(
            explain(
                "save_pretrained",
                "what is loaded again must compute what the model computes.",
                got=got,
                hint="l0hooks.save_pruned and load_pruned, with a function that builds the dense model",
            )
        )


def _with_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """``model`` with its parameters and buffers in these dtypes, **in place**: a class builds all in float32."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
    return model


def _difference(model: nn.Module, other: nn.Module, examples: tuple[Any, ...]) -> float:
    return difference(outputs_of(model, [examples])[0], outputs_of(other, [examples])[0])


def _replace(folder: Path, written: Path) -> None:
    """Bring all files into ``folder``, and remove the weights of an earlier model."""
    folder.mkdir(exist_ok=True)
    new = {path.name for path in written.iterdir()}
    for path in written.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        else:
            path.replace(folder / path.name)
    for pattern in _WEIGHTS:
        for path in folder.glob(pattern):
            if path.name not in new:
                path.unlink()
