"""Which inputs of a model's layers are constant, whatever goes into the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, fx, nn

from l0hooks._torch.modules import parameters_of
from l0hooks._torch.running import evaluating
from l0hooks.structure.dependence import follow
from l0hooks.structure.dependence_rules import Known
from l0hooks.structure.fx_nodes import argument, called_by, name_of
from l0hooks.structure.layers import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED, is_hugging_face_conv1d

_STANDARD = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *EMBEDDINGS)
_READERS = {"linear": ("input", "weight"), "addmm": ("mat1", "mat2")}
_ROUNDING_ULPS = 8  # units in the last place: a constant may differ so much between positions


@torch.no_grad()
def constant_inputs(
    model: nn.Module, program: torch.export.ExportedProgram, example_inputs: Sequence[Any]
) -> dict[str, Tensor]:
    """The input channels of Linear, convolution and Hugging Face ``Conv1D`` layers that never change.

    The exported graph shows which numbers do not depend on the model's inputs. Of these a constant is one that is the
    same for all examples and positions.

    Parameters
    ----------
    model : nn.Module
        Plain; not changed.
    program : torch.export.ExportedProgram
        Of ``model`` in evaluation mode.
    example_inputs : sequence
        Positional arguments.

    Returns
    -------
    dict
        For every such layer that is called as one, by its name: a float64 tensor with the value of each input channel,
        the same for all examples, positions and calls; NaN if there is no such value. A layer whose weight is also used
        in another way is left out.

    Examples
    --------
    >>> model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), torch.zeros(1, 2)
    >>> _ = model[0].weight.data[0].zero_(), model[0].bias.data.copy_(torch.tensor([3.0, 4.0]))
    >>> constant_inputs(model, torch.export.export(model.eval(), (x,)), (x,))["2"].tolist()
    [3.0, nan]
    """
    layers = _layers(model, program)
    seen: dict[str, _Range] = {}
    with evaluating(model):
        for node, known in follow(program, example_inputs):
            for source, name in ((s, layers[s]) for s in node.all_input_nodes if s in layers):
                read = _input_of(node, source, model.get_submodule(name))
                if name not in seen:
                    seen[name] = _Range()
                if read is None or called_by(node) != name:
                    seen[name].used_otherwise = True
                else:
                    seen[name].record(known[read], _channel_axis(model.get_submodule(name)))
    return {name: found.constants() for name, found in seen.items() if not found.used_otherwise}


def _layers(model: nn.Module, program: torch.export.ExportedProgram) -> dict[fx.Node, str]:
    """The layers that compute what their class does, by the place of their weight in the graph."""
    owners = {f"{name}.weight" if name else "weight": name for name, m in model.named_modules() if is_standard(m)}
    names = program.graph_signature.inputs_to_parameters
    return {
        node: owners[names[node.name]]
        for node in program.graph.nodes
        if node.op == "placeholder" and names.get(node.name) in owners
    }


def is_standard(module: nn.Module) -> bool:
    """Whether a layer computes what its class in torch (in transformers) does, with a weight of its own."""
    if parameters_of(module).get("weight") is None or "forward" in vars(module):
        return False
    if is_hugging_face_conv1d(module):
        return True
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _STANDARD)


def _input_of(node: fx.Node, weight: fx.Node, layer: nn.Module) -> fx.Node | None:
    """What ``node`` multiplies with the weight, as a layer does; None if it does something else."""
    name = name_of(node)
    if isinstance(layer, EMBEDDINGS):
        return None
    names = _READERS.get(name, ("input", "weight") if name.startswith("conv") else None)
    if names is None or argument(node, names[1]) is not weight:
        return None
    found = argument(node, names[0])
    return found if isinstance(found, fx.Node) and found is not weight else None


def _channel_axis(layer: nn.Module) -> int:
    return 1 - layer.get_parameter("weight").dim() if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else -1


class _Range:
    """The smallest and the largest number of each input channel of a layer, NaN where it depends on inputs."""

    def __init__(self) -> None:
        self.used_otherwise = False
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._eps = 0.0

    def record(self, read: Known, axis: int) -> None:
        """Add what one call of the layer reads."""
        places = " ".join(f"place{n}" for n in range(-axis - 1))
        x = read.value.detach().double().masked_fill(read.depends, math.nan)
        values = rearrange(x, f"... channel {places} -> channel (... {places})")
        low, high = values.amin(1), values.amax(1)  # NaN if there is one
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self._eps = torch.finfo(read.value.dtype).eps

    def constants(self) -> Tensor:
        """The value of each input channel, NaN where it has more than one."""
        if self._low is None or self._high is None:
            raise RuntimeError("a layer that was never called has no inputs")
        scale = torch.maximum(self._low.abs(), self._high.abs())
        agreed = (self._high - self._low <= _ROUNDING_ULPS * self._eps * scale) & scale.isfinite()
        return torch.where(agreed, (self._low + self._high) / 2, math.nan)
