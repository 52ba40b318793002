"""Architectures of other libraries, built with small random configurations, and inputs that they take."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.configurations import configurations
from benchmarks.transformer_inputs import Way, ways

LIBRARIES = ("transformers", "timm", "torchvision")
_MOST_PARAMETERS = 140_000_000  # of a vision model; other configurations of transformers are tried from fewer on
_MOST_CONFIGURED = 40_000_000
_WIDTHS: tuple[dict[str, Any], ...] = (  # arguments that make a vision model small, where it takes them
    {"embed_dim": 48, "depth": 2, "num_heads": 4},
    {"depth": 2},
    {"depths": (1, 1, 1, 1)},
    {"layers": (1, 1, 1, 1)},
    {},
)
_SIZES, _CACHES = (64, 128, 224, 256), ("past_key_values", "cache_params")


@dataclass(frozen=True)
class Architecture:
    """A model in evaluation mode, and arguments for it by batch size and seed; ``other`` has another length or size."""

    model: nn.Module
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    other: Callable[[int, int], tuple[Tensor, ...]]


class NotBuiltError(Exception):
    """No small configuration of an architecture runs."""


class Called(nn.Module):
    """A model of transformers that takes its arguments by position and returns tensors alone, no caches."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        found = self.model(**dict(zip(self.names, inputs, strict=True)))
        parts = found.items() if isinstance(found, Mapping) else [("", found)]
        return tuple(part for name, part in parts if part is not None and name not in _CACHES)


def available() -> dict[str, str]:
    """The libraries that cannot be imported here, with the reason."""
    missing = {}
    for library in LIBRARIES:
        try:
            if importlib.util.find_spec(library) is None:
                missing[library] = "not installed"
            else:
                importlib.import_module(library)
        except Exception as error:  # noqa: BLE001  # compiled operators that do not fit raise anything
            missing[library] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return missing


def names_of(library: str) -> list[str]:
    """The architectures of a library; of a family in several sizes, one."""
    if library == "transformers":
        configurations: Any = importlib.import_module("transformers.models.auto.configuration_auto")
        models: Any = importlib.import_module("transformers.models.auto.modeling_auto")
        return [name for name in configurations.CONFIG_MAPPING_NAMES if name in models.MODEL_MAPPING_NAMES]
    families: dict[str, str] = {}
    for name in sorted(
        importlib.import_module(library if library == "timm" else "torchvision.models").list_models(), key=_size
    ):
        families.setdefault(_family(name), name)
    return sorted(families.values())


_SIZES_IN_NAMES = """zepto atto femto pico nano xxs xs micro mini tiny ti t n s small little m medium b base so l large
    d x xl h huge g giant xxl xxlarge xxxl gigantic c e f k p q v"""
_SIZE_WORDS = _SIZES_IN_NAMES.split()


def _family(name: str) -> str:
    parts = re.split(r"[_.]", re.sub(r"\d+", "", name.lower()))
    return "_".join(part for part in parts if part and part not in _SIZE_WORDS)


def _size(name: str) -> tuple[int, int, str]:
    """Smaller versions of a family come first."""
    words = [_SIZE_WORDS.index(part) for part in re.split(r"[_.]|\d+", name.lower()) if part in _SIZE_WORDS]
    return sum(words), sum(map(int, re.findall(r"\d+", name))), name


def build(library: str, name: str) -> Architecture:
    """A small random model; NotBuiltError if no configuration that is tried runs."""
    torch.manual_seed(0)
    candidates = _transformers(name) if library == "transformers" else _vision(library, name)
    failed: list[str] = []
    for make in candidates:
        try:
            found = make()
            with torch.no_grad():
                one, two = (found.model(*found.inputs(2, 1)) for _ in range(2))
            if _leaves(one) and all(torch.equal(a, b) for a, b in zip(_leaves(one), _leaves(two), strict=True)):
                return found
            failed.append("its outputs are no tensors, or random")
        except Exception as error:  # noqa: BLE001  # any configuration may be wrong for a model, in any way
            failed.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    raise NotBuiltError("; ".join(dict.fromkeys(failed)) or "nothing to try")


def _leaves(value: Any) -> list[Tensor]:
    return [leaf.nan_to_num() for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _checked(model: nn.Module, most: int = _MOST_PARAMETERS) -> nn.Module:
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > most:
        raise NotBuiltError(f"{count:,} parameters are too many")
    return model.eval()


# --- transformers ----------------------------------------------------------------------------------------------------


def _transformers(name: str) -> Iterator[Callable[[], Architecture]]:
    make: Any = importlib.import_module("transformers").AutoModel.from_config
    for configured in configurations(name):
        try:
            config = configured()
            with torch.device("meta"):
                _checked(make(config), _MOST_CONFIGURED)
            model = _checked(make(config))
        except Exception as error:  # noqa: BLE001  # as in ``build``
            reason = error
            yield lambda reason=reason: _raise(reason)  # type: ignore[misc]
            continue
        for way in ways(model):
            yield lambda model=model, way=way, config=config: _called(model, way, config)  # type: ignore[misc]


def _raise(error: Exception) -> Architecture:
    raise error


def _called(model: nn.Module, way: Way, config: Any) -> Architecture:
    return Architecture(Called(model, way.names).eval(), way.inputs(config, 12, 1), way.inputs(config, 9, 2))


# --- vision ----------------------------------------------------------------------------------------------------------


def _vision(library: str, name: str) -> Iterator[Callable[[], Architecture]]:
    fixed: dict[str, Any] = {"num_classes": 7}
    if library == "timm":
        create = importlib.import_module("timm").create_model
    else:
        models = importlib.import_module("torchvision.models")
        create = models.get_model
        no_downloads = ("weights", "weights_backbone")
        fixed |= {
            key: None for key in no_downloads if key in inspect.signature(models.get_model_builder(name)).parameters
        }
    for width in _WIDTHS:
        sizes = [({"img_size": size}, size) for size in _SIZES] if library == "timm" else []
        for extra, size in [*sizes, *(({}, size) for size in _SIZES)]:
            for frames in (0, 8, 16) if library == "torchvision" else (0,):
                arguments = {**fixed, **width, **extra}
                yield lambda a=arguments, s=size, f=frames: _images(create, name, a, s, f)  # type: ignore[misc]


def _images(
    create: Callable[..., nn.Module], name: str, arguments: Mapping[str, Any], size: int, frames: int
) -> Architecture:
    if "weights" not in arguments:  # torchvision's regnets cannot be built there
        with torch.device("meta"):
            _checked(create(name, **arguments))
    model = _checked(create(name, **arguments))

    def maker(side: int) -> Callable[[int, int], tuple[Tensor, ...]]:
        def inputs(batch: int, seed: int) -> tuple[Tensor, ...]:
            generator = torch.Generator().manual_seed(seed)
            return (torch.randn((batch, 3, *([frames] if frames else []), side, side), generator=generator),)

        return inputs

    return Architecture(model, maker(size), maker(size + size // 2))
