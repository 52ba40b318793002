"""One safetensors file: tensors, and a header with a JSON plan and a digest of both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l0hooks._files import replacing
from l0hooks.errors import InvalidValueError, explain, import_extra

_FORMAT = "l0hooks 2"
_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write(tensors: dict[str, Tensor], plan: dict[str, Any], path: str | Path) -> None:
    """Write contiguous ``tensors`` that share no memory, and a ``plan`` of plain data, to ``path``.

    Raises
    ------
    MissingExtraError
        If safetensors is not installed.
    """
    safetensors = import_extra("safetensors.torch", extra="examples", where="save_pruned")
    whole = {"format": _FORMAT, **plan}
    whole["sha256"] = _digest(tensors, whole)
    with replacing(path) as temporary:  # safetensors before 0.8 destroys the old file if the disk is full
        safetensors.save_file(tensors, str(temporary), metadata={"l0hooks": json.dumps(whole)})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the plan of a file.

    Raises
    ------
    InvalidValueError
        If :func:`write` did not write the file, or if a bit of it has changed.
    MissingExtraError
        If safetensors is not installed.
    """
    safetensors = import_extra("safetensors", extra="examples", where="load_pruned")

    def refuse(got: str) -> InvalidValueError:
        return InvalidValueError(
            explain(f"load_pruned {path}", "the file must be one that save_pruned wrote, undamaged.", got=got)
        )

    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except safetensors.SafetensorError as error:
        raise refuse(str(error)) from error
    if "l0hooks" not in metadata:
        raise refuse("a safetensors file without a plan")
    try:
        plan = json.loads(metadata["l0hooks"])
    except (ValueError, RecursionError) as error:
        raise refuse("a plan that is not JSON") from error
    if not isinstance(plan, dict) or plan.get("format") != _FORMAT:
        raise refuse(f"format {plan.get('format') if isinstance(plan, dict) else None!r}, not {_FORMAT!r}")
    if plan.pop("sha256", None) != _digest(tensors, plan):
        raise refuse("tensors or a plan that differ from those that were written")
    del plan["format"]
    return tensors, plan


def floating_dtypes(path: Path) -> dict[str, torch.dtype]:
    """The dtypes of the floating-point tensors in a safetensors file; no tensor is read.

    Raises
    ------
    InvalidValueError
        If it is no safetensors file.
    MissingExtraError
        If safetensors is not installed.
    """
    safetensors = import_extra("safetensors", extra="examples", where="load_pruned")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            found = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # not a mapping
    except safetensors.SafetensorError as error:
        raise InvalidValueError(
            explain(f"load_pruned {path}", "the file must be one that save_pruned wrote, undamaged.", got=str(error))
        ) from error
    return {name: _FLOATING[dtype] for name, dtype in found.items() if dtype in _FLOATING}


def _digest(tensors: dict[str, Tensor], plan: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
