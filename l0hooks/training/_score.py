"""``score``: what closing each gate would cost, from a few batches of data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from l0hooks.attach.plain import plain_copy
from l0hooks.attach.walk import Gated, iter_gated
from l0hooks.errors import SpecError, StateError, explain, near_names
from l0hooks.gates.gate import iter_gates
from l0hooks.training.batches import Forward, check_batches
from l0hooks.training.by_gate import check_data
from l0hooks.training.criteria import CRITERIA, Criterion


class Scores(Mapping[str, Tensor]):
    """What closing each gate would cost, by the qualified name of the gate.

    Parameters
    ----------
    values : mapping from str to Tensor, float32, >= 0, shape of the gate
    places : mapping from str to str
        The module whose weight each gate multiplies.
    criterion : str

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = sparsify(model, {"2": "input"})
    >>> print(score(model, [torch.ones(8, 4)], criterion="magnitude"))  # doctest: +ELLIPSIS
    magnitude scores of 2 gates
    2: 2 gates, ... to ..., median ...
    """

    def __init__(self, values: Mapping[str, Tensor], places: Mapping[str, str], criterion: str) -> None:
        self.criterion = criterion
        self._values = dict(values)
        self._places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __str__(self) -> str:
        lines = [f"{self.criterion} scores of {sum(v.numel() for v in self.values()):,} gates"]
        for name, value in self.items():
            low, high, middle = float(value.min()), float(value.max()), float(value.median())
            lines.append(f"{self._places[name]}: {value.numel():,} gates, {low:.3g} to {high:.3g}, median {middle:.3g}")
        return "\n".join(lines)

    __repr__ = __str__


def score(
    model: nn.Module,
    batches: Iterable[Any] = (),
    *,
    loss: Forward | None = None,
    criterion: Criterion = "taylor",
) -> Scores:
    """What closing each gate of ``model`` would cost: one number for each gate, from a few batches.

    All gates are taken as open: the weights beneath them are looked at, in evaluation mode. Members of a coupled group
    are judged by all weights that read them. The scores start a budget, ``set_budget(model, budget, scores=...)``,
    which divides them by what each gate's removal saves.

    Parameters
    ----------
    model : nn.Module
        With gates. Not changed.
    batches : iterable
        Each a tensor, a tuple of positional arguments or a mapping of keyword arguments of ``model``; anything at all
        if ``loss`` takes it apart. 8 to 64 small batches are enough; each counts alike.
    loss : callable (model, batch) -> Tensor, optional
        A scalar; or, of any other shape, numbers to be preserved, such as logits or embeddings. Without it all outputs
        of the model are to be preserved.
    criterion : "taylor", "wanda", "activation" or "magnitude"
        - "taylor": ½·mean (∂loss/∂z)², the increase of the loss by Fisher's matrix;
        - "wanda": Σ weight²·mean input², the change of the layers' outputs;
        - "activation": mean input² (mean output² for gates on outputs);
        - "magnitude": Σ weight², which needs no batches.

    Returns
    -------
    Scores
        A mapping from the qualified name of each gate to a Tensor, float32, of its shape. Gates that stand alone,
        without weights, have none.

    Raises
    ------
    StateError
        If no gate multiplies a weight, or weights have no data or are spread over processes.
    SpecError
        If the criterion is unknown or does not fit a layer, or there are no batches.
    InvalidValueError
        If gradients are not finite.

    Examples
    --------
    >>> from l0hooks import Budget, prune, set_budget, sparsify
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> x = torch.randn(64, 8)
    >>> _ = sparsify(model, "coupled", example_inputs=(x,))
    >>> scores = score(model, x.split(8))
    >>> _ = set_budget(model, Budget(sparsity=0.5, unit="params", steps=0), scores=scores)
    >>> prune(model, example_inputs=(x,))
    Sequential(
      (0): Linear(in_features=8, out_features=7, bias=True)
      (1): ReLU()
      (2): Linear(in_features=7, out_features=4, bias=True)
    )

    References
    ----------
    Molchanov, Mallya, Tyree, Frosio & Kautz (2019), Importance estimation for neural network pruning, equation 8;
    Sun, Liu, Bair & Kolter (2024), A simple and effective pruning approach for large language models, equation 1.
    """
    if criterion not in CRITERIA:
        raise SpecError(
            explain(
                "score",
                "the criterion must be known.",
                got=repr(criterion),
                hint=near_names(str(criterion), get_args(Criterion)),
            )
        )
    found = check_batches("score", batches) if criterion != "magnitude" else ()
    scored = _scored(model)
    plain = plain_copy(model).eval()
    gpus = {p.device.index for p in plain.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(gpus):
        values = CRITERIA[criterion](plain, scored, found, loss)
    names = {id(gate): name for name, gate in iter_gates(model)}
    keys = [names[id(one.gate)] for one in scored]
    places = {key: one.name for key, one in zip(keys, scored, strict=True)}
    return Scores(dict(zip(keys, values, strict=True)), places, criterion)


def _scored(model: nn.Module) -> list[Gated]:
    """The gates that multiply weights."""
    scored = [one for one in iter_gated(model) if one.sites]
    if not scored:
        raise StateError(
            explain("score", "gates must multiply weights.", got="none that do", hint="sparsify(model, spec) first")
        )
    check_data("score", (site for one in scored for site in one.weights()))
    return scored
