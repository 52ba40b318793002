"""Gates that one forward reads at many places, sampled once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l0hooks._torch.autograd import is_recorded_once, is_traced
from l0hooks._torch.memory import fresh
from l0hooks._torch.tensors import is_sharded, version
from l0hooks.gates.constants import Constants
from l0hooks.gates.families import HardConcreteFamily
from l0hooks.gates.gate import Gate
from l0hooks.gates.random import Stream
from l0hooks.gates.sampling import draw, sampled_backward

LARGEST_TOGETHER = 2**15  # gates; copying larger arrays side by side costs more than the calls it saves


class _Chain:
    """The streams of several gates, one after the other along the last axis."""

    def __init__(self, streams: Sequence[Stream], sizes: list[int]) -> None:
        self._streams = streams
        self._sizes = sizes

    def uniform_(self, out: Tensor) -> Tensor:
        for stream, part in self._parts(out):
            part.copy_(stream.uniform_(fresh(part.shape, part.dtype, part.device)))
        return out

    def logistic_(self, out: Tensor, scale: float) -> Tensor:
        for stream, part in self._parts(out):
            part.copy_(stream.logistic_(fresh(part.shape, part.dtype, part.device), scale))
        return out

    def _parts(self, out: Tensor) -> Iterable[tuple[Stream, Tensor]]:
        return zip(self._streams, torch.split(out, self._sizes, -1), strict=True)


class _SampledTogether(torch.autograd.Function):
    """sample(log_alpha, noise) for several log-odds of one axis; no gradient for those whose gates were never read."""

    @staticmethod
    def forward(
        ctx: Any, noise: Stream, constants: Constants, examples: int | None, *log_alphas: Tensor
    ) -> tuple[Tensor, ...]:
        together = torch.cat(log_alphas)
        shape = together.shape if examples is None else (examples, *together.shape)
        gates = fresh(shape, together.dtype, together.device)
        draw(gates, together, noise, constants)
        ctx.set_materialize_grads(False)
        ctx.constants = constants
        ctx.kept = gates, log_alphas  # saved tensors are gone after the first backward pass
        return torch.split(gates.detach(), [len(location) for location in log_alphas], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gates, log_alphas = ctx.kept
        sizes = [len(location) for location in log_alphas]
        shares = zip(grads, torch.split(gates, sizes, -1), strict=True)
        grad = torch.cat([torch.zeros_like(z) if g is None else g for g, z in shares], -1)
        slopes = torch.split(sampled_backward(torch.cat(log_alphas), gates, grad, ctx.constants), sizes)
        return None, None, None, *(None if g is None else slope for g, slope in zip(grads, slopes, strict=True))


class _Sample(NamedTuple):
    """A gate's share, and what it was drawn from."""

    log_alpha: Tensor
    version: object
    temperature: float
    gates: Tensor


def keep_probs(gates: Sequence[Gate]) -> list[Tensor]:
    """``gate.keep_prob()`` of every gate, computed together where small gates are of one kind.

    Parameters
    ----------
    gates : sequence of Gate

    Returns
    -------
    list of Tensor, float32, the shapes of their ``log_alpha``, differentiable

    Examples
    --------
    >>> [p.shape for p in keep_probs([Gate(3), Gate((2, 2))])]
    [torch.Size([3]), torch.Size([2, 2])]
    """
    found: dict[int, Tensor] = {}
    for kind, numbers in _kinds(gates).items():
        if kind is None or len(numbers) == 1:
            found |= {n: gates[n].keep_prob() for n in numbers}
        else:
            locations = [gates[n].log_alpha for n in numbers]
            together = kind.family.keep_prob(torch.cat([x.flatten() for x in locations]), kind.temperature)
            parts = torch.split(together, [x.numel() for x in locations])
            found |= {n: part.view_as(x) for n, part, x in zip(numbers, parts, locations, strict=True)}
    return [found[n] for n in range(len(gates))]


def expected_l0(gates: Sequence[Gate]) -> Tensor:
    """The sum of ``gate.expected_l0()``, computed together where small gates are of one kind.

    Parameters
    ----------
    gates : sequence of Gate, at least one

    Returns
    -------
    Tensor, float32, shape (), on the device of the first gate, differentiable

    Examples
    --------
    >>> expected_l0([Gate(3, init_keep_prob=0.5), Gate((2, 2), init_keep_prob=0.5)]).item()
    3.5
    """
    counts = []
    for kind, numbers in _kinds(gates).items():
        if kind is None or len(numbers) == 1:
            counts += [gates[n].expected_l0() for n in numbers]
        else:
            together = torch.cat([gates[n].log_alpha.flatten() for n in numbers])
            counts.append(kind.family.keep_prob(together, kind.temperature).sum())
    total, *rest = counts
    for count in rest:
        total = total + count.to(total.device)
    return total


def sampled_together(
    log_alphas: Sequence[Tensor], noise: Stream, constants: Constants, examples: int | None = None
) -> tuple[Tensor, ...]:
    """``sampled`` for several log-odds, in one node of the graph.

    Outputs with backward passes of their own may come from it: what it saves stays as long as the graph. Log-odds
    whose gates were never read get no gradient.

    Parameters
    ----------
    log_alphas : sequence of Tensor, each of one axis, of one dtype
    noise : Stream
        For all of them, one after the other along the last axis.
    constants : Constants
    examples : int, optional

    Returns
    -------
    tuple of Tensor, one for each of ``log_alphas``

    Examples
    --------
    >>> from l0hooks.gates.random import stream
    >>> noise = stream(0, 3, torch.device("cpu"))
    >>> sampled_together([torch.tensor([30.0, -30.0]), torch.tensor([30.0])], noise, Constants())
    (tensor([1., 0.]), tensor([1.]))
    """
    gates: tuple[Tensor, ...] = _SampledTogether.apply(  # type: ignore[no-untyped-call]
        noise, constants, examples, *log_alphas
    )
    return gates


class _Kind(NamedTuple):
    """What gates must have in common for one pass over all of them."""

    family: HardConcreteFamily
    temperature: float
    device: torch.device
    dtype: torch.dtype


def _kinds(gates: Sequence[Gate]) -> dict[_Kind | None, list[int]]:
    """The numbers of the gates of each kind; None for those that are computed alone."""
    kinds: dict[_Kind | None, list[int]] = {}
    for number, gate in enumerate(gates):
        location, family = gate.log_alpha, gate.family
        alone = location.numel() > LARGEST_TOGETHER or is_sharded(location) or type(gate) is not Gate
        kind = None
        if not alone and isinstance(family, HardConcreteFamily):
            kind = _Kind(family, gate.temperature, location.device, location.dtype)
        kinds.setdefault(kind, []).append(number)
    return kinds


class SharedSampling:
    """Gates with one source of noise, sampled together.

    The first reader in a forward samples all of them, in one node of the graph; the others take their share. A reader
    samples for itself wherever the graph could not be shared: in recomputation, under hooks for saved tensors (as
    activation checkpointing sets them), in a compiled graph, and outside every forward. The noise is the same.

    Parameters
    ----------
    gates : sequence of Gate
    """

    def __init__(self, gates: Sequence[Gate]) -> None:
        self._gates = tuple(gates)

    def sample(self, gate: Gate, examples: int | None = None) -> Tensor:
        """``gate.sample(examples)``, shared where it can be."""
        shared = gate.shared
        if is_traced() or shared is None or not is_recorded_once():
            return gate.sample(examples)
        key = (id(self), examples, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if key not in shared:
            shared[key] = self._draw(examples)
        share: _Sample | None = shared[key].get(id(gate))
        if share is None or not (
            share.log_alpha is gate.log_alpha
            and share.version == version(gate.log_alpha)
            and share.temperature == gate.temperature
        ):
            return gate.sample(examples)
        return share.gates

    def _draw(self, examples: int | None) -> dict[int, _Sample]:
        """Samples of the gates that are of one kind, by the gates' ids."""
        kinds: dict[tuple[Constants, torch.device, torch.dtype], list[Gate]] = {}
        for gate in self._gates:
            constants, location = gate.constants, gate.log_alpha
            fixed = gate.rule is not None and gate.rule.finished
            if not (fixed or is_sharded(location) or location.is_inference()) and constants is not None:
                kinds.setdefault((constants, location.device, location.dtype), []).append(gate)
        shares: dict[int, _Sample] = {}
        for (constants, *_), gates in kinds.items():
            shares |= _sample(gates, constants, examples)
        return shares


def _sample(gates: Sequence[Gate], constants: Constants, examples: int | None) -> dict[int, _Sample]:
    locations = [gate.log_alpha for gate in gates]
    noise = _Chain([gate.stream(examples) for gate in gates], [len(location) for location in locations])
    values = sampled_together(locations, noise, constants, examples)
    return {
        id(gate): _Sample(location, version(location), gate.temperature, value)
        for gate, location, value in zip(gates, locations, values, strict=True)
    }
