"""What every process of ``benchmarks.coverage`` needs, imported once by the server that forks them."""

import importlib

import torch._dynamo
import torch.export  # noqa: F401

from benchmarks.architectures import available

_PARTS = {
    "transformers": ("modeling_layers", "models.auto.modeling_auto", "models.auto.configuration_auto"),
    "timm": ("models",),
    "torchvision": ("models",),
}
for library in _PARTS.keys() - available().keys():
    for part in _PARTS[library]:
        importlib.import_module(f"{library}.{part}")
