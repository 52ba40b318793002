"""``save_pretrained`` of gated models of transformers: what it writes, ``from_pretrained`` can load."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from l0hooks._torch.tensors import is_meta, is_sharded
from l0hooks.attach.copies import folded_weights
from l0hooks.attach.gated_weight import Site, iter_sites
from l0hooks.attach.open_experts import any_hidden
from l0hooks.attach.width_weight import WidthWeight
from l0hooks.errors import L0HooksWarning, explain
from l0hooks.structure.width.fold import centring_norms

_METHOD = "save_pretrained"


class SavesBoth:
    """In place of a gated model's ``save_pretrained``: writes the gated weights, and beside them the plain ones.

    Without the plain ones ``from_pretrained`` would begin with new weights. They are the products with the test-time
    gates. Loaded into a gated model, as a trainer does when it resumes, the gated ones count.

    Parameters
    ----------
    model : PreTrainedModel
        With gates.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write as the model's class does."""
        method = inspect.getattr_static(type(self.model), _METHOD)
        bound = inspect.signature(method).bind(self.model, *args, **kwargs)
        sites = list(iter_sites(self.model))
        if any(is_sharded(site.weight) or is_meta(site.weight) for site in sites):
            message = explain(
                _METHOD,
                "from_pretrained needs the plain weights beside the gated ones.",
                got="weights that are spread over processes: the gated ones alone are written",
                hint="l0hooks.prune, then save_pretrained of the result",
            )
            warnings.warn(message, stacklevel=2)
        elif sites:
            if any_hidden(self.model):
                message = explain(
                    _METHOD,
                    "from_pretrained loads plain weights, with a router that chooses among all experts.",
                    got="experts with closed gates, which it will choose, too",
                    hint="l0hooks.prune, then save_pretrained of the result",
                )
                warnings.warn(message, L0HooksWarning, stacklevel=2)
            self._warn_if_centred(sites)
            given = bound.arguments.get("state_dict")
            state = dict(self.model.state_dict() if given is None else given)
            folded = folded_weights(sites)
            for name in [name for name in state if ".parametrizations." in f".{name}"]:
                state[name] = state[name].clone()  # tied ones several times: files hold no shared memory
            for site in sites:
                state[site.name] = folded[id(site.weight)].clone()
            bound.arguments["state_dict"] = state
        return method(*bound.args, **bound.kwargs)

    def _warn_if_centred(self, sites: Sequence[Site]) -> None:
        """A norm of plain weights takes its mean over all channels of a stream, the closed ones among them."""
        gatings = {id(site.gating): site.gating for site in sites}
        for gating in (one for one in gatings.values() if isinstance(one, WidthWeight)):
            for number, gate in zip(gating.numbers, gating.gates, strict=True):
                norms = list(centring_norms(self.model, gating.plan.groups[number]))
                if norms and not bool(gate.support().all()):
                    message = explain(
                        _METHOD,
                        "the plain weights beside the gated ones are to compute the same.",
                        got='closed channels of kind "width" under norms that subtract the mean, which they cannot say',
                        hint="l0hooks.prune, then save_pretrained of the result",
                    )
                    warnings.warn(message, stacklevel=3)
                    return

    def remove(self) -> None:
        """Give the model its own method back."""
        vars(self.model).pop(_METHOD, None)


def save_both(model: nn.Module) -> list[SavesBoth]:
    """Let all models of transformers within ``model`` that hold gates write plain weights, too, **in place**."""
    base: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if base is None:
        return []
    found = []
    for module in model.modules():
        if isinstance(module, base) and next(iter_sites(module), None) is not None and _METHOD not in vars(module):
            found.append(SavesBoth(module))
            vars(module)[_METHOD] = found[-1]
    return found


def plain_method(model: nn.Module) -> None:
    """Take away what :func:`save_both` has put into ``model``, **in place**."""
    for module in model.modules():
        method = vars(module).get(_METHOD)
        if isinstance(method, SavesBoth):
            del vars(module)[_METHOD]
