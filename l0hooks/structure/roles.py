"""Along which axes a layer writes channels, reads them, or passes them on one by one."""

from __future__ import annotations

from torch import nn

from l0hooks._torch.modules import NORMS
from l0hooks.errors import UnsupportedModuleError, explain
from l0hooks.structure.layers import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED, is_hugging_face_conv1d

_CHANNEL_MIXING = (nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
_WRITER_TYPES = "Linear, convolution, transposed convolution, Embedding or Hugging Face Conv1D"
_READER_TYPES = "Linear, convolution, transposed convolution or Hugging Face Conv1D"
_CARRIER_TYPES = "BatchNorm, InstanceNorm, GroupNorm, PReLU with a slope for each channel, or depthwise convolution"


def written(where: str, module: nn.Module) -> dict[str, int]:
    """The axis of each tensor along which a layer writes."""
    if isinstance(module, EMBEDDINGS):
        if module.max_norm is not None:
            raise _refusal(where, "an embedding with max_norm mixes its channels.", module, "max_norm=None")
        return {"weight": 1}
    transposed = _reads_first(where, module, _WRITER_TYPES)
    return {"weight": 1 if transposed else 0, "bias": 0}


def read(where: str, module: nn.Module) -> dict[str, int]:
    """The axis of its weight along which a layer reads."""
    return {"weight": 0 if _reads_first(where, module, _READER_TYPES) else 1}


def _reads_first(where: str, module: nn.Module, wanted: str) -> bool:
    """Whether the inputs lie along the first axis of a weight; raises if the layer is not one of ``wanted``."""
    transposed = isinstance(module, TRANSPOSED) or is_hugging_face_conv1d(module)
    if not (transposed or isinstance(module, (nn.Linear, *CONVOLUTIONS))):
        hint = "through=... for layers that pass channels on" if _is_carrier(module) else None
        raise _refusal(where, f"the layer must be a {wanted}.", module, hint)
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and module.groups > 1:
        hint = "through=..." if _is_depthwise(module) else "leave its channels ungated"
        raise _refusal(where, "a grouped convolution couples its channels.", f"groups={module.groups}", hint)
    return transposed


def carried(where: str, module: nn.Module) -> dict[str, int]:
    """The axis of each tensor of a layer that passes channels on."""
    if isinstance(module, _CHANNEL_MIXING):
        raise _refusal(
            where,
            "the layer mixes all channels: removing one changes the others.",
            module,
            "leave these channels ungated",
        )
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        raise _refusal(where, "the layer must have a slope for each channel.", "one for all", "leave the layer out")
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and not _is_depthwise(module):
        got = f"groups={module.groups} of {module.in_channels} channels to {module.out_channels}"
        raise _refusal(where, "only depthwise convolutions keep channels separate.", got, "inputs=... or outputs=...")
    if not _is_carrier(module):
        has = next(module.parameters(), None) is not None
        hint = None if has else "leave out layers without parameters"
        raise _refusal(where, f"the layer must be a {_CARRIER_TYPES}.", module, hint)
    if isinstance(module, nn.GroupNorm) and not module.affine:
        raise _refusal(where, "a GroupNorm is cut together with its weights.", "affine=False", "affine=True")
    return {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}


def _is_carrier(module: nn.Module) -> bool:
    kinds = (*NORMS, nn.GroupNorm, nn.PReLU)
    return isinstance(module, kinds) or _is_depthwise(module)


def _is_depthwise(module: nn.Module) -> bool:
    if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return False
    return 1 < module.groups == module.in_channels == module.out_channels


def _refusal(where: str, must: str, got: nn.Module | str, hint: str | None) -> UnsupportedModuleError:
    shown = type(got).__name__ if isinstance(got, nn.Module) else got
    return UnsupportedModuleError(explain(f"declare_group: {where}", must, got=shown, hint=hint))
