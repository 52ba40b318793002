"""Run by .ci/run with the built wheel in an environment that holds nothing else: import, version, one round trip."""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

before = set(sys.modules)
import l0hooks  # noqa: E402  # what it adds is what is being looked at

OPTIONAL = (
    "sklearn",
    "narwhals",
    "pandas",
    "matplotlib",
    "tqdm",
    "onnx",
    "transformers",
    "lightning",
    "safetensors",
    "scipy.sparse",
    "triton",
)
added = set(sys.modules) - before
if added & set(OPTIONAL) or "site-packages" not in l0hooks.__file__:
    raise SystemExit(f"imported {sorted(added & set(OPTIONAL))} from {l0hooks.__file__}")
if l0hooks.__version__ != version("l0hooks") or not (Path(l0hooks.__file__).parent / "py.typed").exists():
    raise SystemExit("version or py.typed is wrong")

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
l0hooks.sparsify(model, "weight")
model(torch.zeros(1, 4)).sum().backward()
pruned = l0hooks.prune(model, example_inputs=(torch.zeros(1, 4),))
if type(pruned[0]) is not torch.nn.Linear:
    raise SystemExit(f"not plain: {pruned}")
try:
    import l0hooks.integrations.lightning
except l0hooks.L0HooksError as error:
    if 'pip install "l0hooks[lightning]"' not in str(error):
        raise
else:
    raise SystemExit("lightning is not installed here")
sys.stdout.write(f"l0hooks {l0hooks.__version__} works from its wheel\n")
