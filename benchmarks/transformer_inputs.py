"""Which arguments a model of transformers is called with, and random ones of each kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.configurations import FIRST_TOKEN, LAST_TOKEN

_STEPS = ("states", "actions", "rewards", "returns_to_go", "timesteps")
_WAYS = (  # those with most parts first
    *(("input_ids", "pixel_values"), ("pixel_values", "input_ids"), ("input_ids", "decoder_input_ids")),
    *(("input_features", "decoder_input_ids"), ("input_values", "decoder_input_ids")),
    *(("input_ids", "input_features"), ("past_values", "past_time_features", "past_observed_mask"), ("past_values",)),
    *(("input_ids",), ("pixel_values",), ("input_features",), ("input_values",), ("pixel_values_videos",), _STEPS, ()),
)
_STYLES = {"input_features": 2, "input_values": 3, "past_values": 2}  # in how many shapes a name is tried
_GRID = 4  # patches along each side where images come as patches


@dataclass(frozen=True)
class Way:
    """Arguments by name; ``style`` says in which shape sound and series come."""

    names: tuple[str, ...]
    style: int

    def inputs(self, config: Any, length: int, image_factor: int) -> Callable[[int, int], tuple[Tensor, ...]]:
        """Arguments by batch size and seed."""

        def made(batch: int, seed: int) -> tuple[Tensor, ...]:
            draw = _Draw(config, self, batch, length, image_factor, torch.Generator().manual_seed(seed))
            return tuple(_MAKERS[name](draw) for name in self.names)

        return made


def ways(model: nn.Module) -> Iterator[Way]:
    """What to try to call a model with."""
    parameters = inspect.signature(model.forward).parameters
    usual = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind in usual]
    tried: set[tuple[str, ...]] = set()
    for way in _WAYS:
        wanted = [name for name in dict.fromkeys((*required, *_COMPANIONS)) if name in parameters]
        for more in (wanted, required):
            names = (*way, *(name for name in more if name not in way))
            known = bool(names) and all(name in parameters and name in _MAKERS for name in names)
            if known and all(one in parameters for one in way) and names not in tried:
                tried.add(names)
                for style in range(max(_STYLES.get(name, 1) for name in names)):
                    yield Way(names, style)


@dataclass(frozen=True)
class _Draw:
    config: Any
    way: Way
    batch: int
    length: int
    image_factor: int
    generator: torch.Generator

    def first(self, names: Sequence[str], default: int, *parts: str) -> int:
        """The first integer of one of these names in a part of the configuration, or in the whole."""
        found = [getattr(self.config, part, None) for part in parts]
        for config in (*(part for part in found if part is not None), self.config):
            for name in names:
                value = getattr(config, name, None)
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if type(value) is int:
                    return value
        return default

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    @property
    def channels(self) -> int:
        return self.first(("num_channels", "in_channels", "in_chans"), 3, "vision_config")

    @property
    def side(self) -> int:
        return self.first(("image_size",), 64, "vision_config", "backbone_config") * self.image_factor


def _tokens(draw: _Draw) -> Tensor:
    return draw.whole(FIRST_TOKEN, LAST_TOKEN, draw.batch, draw.length)


def _images(draw: _Draw) -> Tensor:
    if any("grid" in name or "spatial_shapes" in name or "position_ids" in name for name in draw.way.names):
        return _patches(draw)
    return draw.normal(draw.batch, draw.channels, draw.side, draw.side)


def _patches(draw: _Draw) -> Tensor:
    """All patches of all images in a row, or by image where a mask or positions say which there are."""
    side = draw.first(("patch_size", "spatial_patch_size"), 8, "vision_config")
    times = draw.first(("temporal_patch_size",), 1, "vision_config")
    count, width = _GRID * _GRID, draw.channels * times * side * side
    flat = any("grid" in name for name in draw.way.names)
    return draw.normal(draw.batch * count, width) if flat else draw.normal(draw.batch, count, width)


def _sound(draw: _Draw) -> Tensor:
    length = 400 * draw.length
    bins = draw.first(("num_mel_bins",), 16)
    longest = draw.first(("max_length",), 10 * draw.length)
    shapes = (
        (draw.batch, length),
        (draw.batch, draw.first(("audio_channels",), 1), length),
        (draw.batch, longest, bins),
    )
    return draw.normal(*shapes[draw.way.style])


def _spectrum(draw: _Draw) -> Tensor:
    names = ("num_mel_bins", "feature_size", "input_feat_size", "input_dim", "input_channels", "n_mels", "mel_bins")
    bins = draw.first(names, 16, "audio_config", "encoder_config", "audio_encoder_config")
    times = 10 * draw.length
    transposed = (draw.way.names[-1] == "decoder_input_ids") != bool(draw.way.style)
    return draw.normal(draw.batch, bins, times) if transposed else draw.normal(draw.batch, times, bins)


def _boxes(draw: _Draw) -> Tensor:
    corners = draw.whole(0, 40, draw.batch, draw.length, 2)
    return torch.cat([corners, corners + draw.whole(1, 40, draw.batch, draw.length, 2)], -1)


def _series(draw: _Draw) -> Tensor:
    lags = getattr(draw.config, "lags_sequence", None) or [0]
    times = draw.first(("context_length",), 32) + max(lags)
    channels = draw.first(("num_input_channels", "input_size"), 1)
    return (
        draw.normal(draw.batch, times) if draw.way.style or channels == 1 else draw.normal(draw.batch, times, channels)
    )


def _time_features(draw: _Draw) -> Tensor:
    return draw.normal(draw.batch, _series(draw).shape[1], draw.first(("num_time_features",), 0))


def _grid(draw: _Draw) -> Tensor:
    return torch.tensor([[1, _GRID, _GRID]] * draw.batch)


def _positions(draw: _Draw) -> Tensor:
    places = torch.cartesian_prod(torch.arange(_GRID), torch.arange(_GRID))
    return places.expand(draw.batch, *places.shape).contiguous()


_MAKERS: dict[str, Callable[[_Draw], Tensor]] = {
    **dict.fromkeys(("input_ids", "decoder_input_ids"), _tokens),
    "pixel_values": _images,
    "pixel_values_videos": lambda d: d.normal(
        d.batch, d.first(("num_frames", "frames_per_clip"), 4), d.channels, d.side, d.side
    ),
    "input_values": _sound,
    "input_features": _spectrum,
    "hidden_states": _patches,
    "bbox": _boxes,
    "past_values": _series,
    "past_observed_mask": lambda d: torch.ones_like(_series(d)),
    "past_time_features": _time_features,
    **dict.fromkeys(("grid_thw", "image_grid_thw"), _grid),
    "spatial_shapes": lambda d: torch.full((d.batch, 2), _GRID),
    **dict.fromkeys(("pixel_position_ids", "image_position_ids"), _positions),
    "pixel_attention_mask": lambda d: torch.ones((d.batch, _GRID * _GRID), dtype=torch.int64),
    **dict.fromkeys(
        ("input_features_mask", "feature_attention_mask"),
        lambda d: torch.ones((d.batch, 10 * d.length), dtype=torch.int64),
    ),
    **dict.fromkeys(
        ("query_embeds", "inputs_embeds", "encoder_outputs"),
        lambda d: d.normal(d.batch, d.length, d.first(("hidden_size", "d_model", "hidden_dim"), 32)),
    ),
    "visual_feats": lambda d: d.normal(d.batch, 5, d.first(("visual_feat_dim",), 16)),
    "visual_pos": lambda d: d.normal(d.batch, 5, d.first(("visual_pos_dim",), 4)),
    "states": lambda d: d.normal(d.batch, d.length, d.first(("state_dim",), 4)),
    "actions": lambda d: d.normal(d.batch, d.length, d.first(("act_dim",), 4)),
    **dict.fromkeys(("rewards", "returns_to_go"), lambda d: d.normal(d.batch, d.length, 1)),
    "timesteps": lambda d: d.whole(0, 8, d.batch, d.length),
}
_COMPANIONS = ("bbox", "grid_thw", "spatial_shapes", "pixel_position_ids", "visual_feats", "visual_pos")
