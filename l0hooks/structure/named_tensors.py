"""The tensors of a model by name, and which of them share memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from l0hooks._torch.tensors import is_placed, memory_of, same_tensor


class Tensors:
    """Initialised parameters and floating-point buffers under all their names, in the order of the model's state.

    Attributes
    ----------
    by_name : dict from str to Tensor
        Parameters first, then buffers.
    buffers : frozenset of str
        Which of them are buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        lazy = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
        parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not isinstance(p, lazy)}
        buffers = {
            n: b
            for n, b in model.named_buffers(remove_duplicate=False)
            if not isinstance(b, lazy) and b.is_floating_point()
        }
        self.by_name: dict[str, Tensor] = {**parameters, **buffers}
        self.buffers = frozenset(buffers)
        self._tied: dict[tuple[Any, ...], list[str]] = {}
        for name, tensor in self.by_name.items():
            self._tied.setdefault(same_tensor(tensor), []).append(name)

    def names(self, name: str) -> tuple[str, ...]:
        """All names of a tensor: more than one if it is tied."""
        return tuple(self._tied[same_tensor(self.by_name[name])])

    def overlapping(self, name: str) -> str | None:
        """The name of another tensor, a transpose or a part, that shares memory with this one; None if none does."""
        tensor = self.by_name[name]
        if not is_placed(tensor):
            return None
        first, after = memory_of(tensor)
        for other, (example, *_) in self._tied.items():
            found = self.by_name[example]
            if other != same_tensor(tensor) and is_placed(found) and found.device == tensor.device:
                start, end = memory_of(found)
                if start < after and first < end:
                    return example
        return None
