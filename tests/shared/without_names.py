"""Runs l0hooks once for each private name of torch, in a process whose torch lacks it while l0hooks is imported.

Prints what each check gives, as JSON: numbers, or the error. torch itself gets its names back after the import, since
its own Python files need many of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def owner_of(path: str) -> tuple[dict[str, Any], str]:
    """The table that holds ``torch.<path>``, and the last part of the name."""
    *parents, name = path.split(".")
    found: Any = torch
    for parent in parents:
        found = vars(found)[parent]
    return vars(found), name


def import_without(paths: Sequence[str]) -> None:
    """Import l0hooks while torch lacks these names."""
    taken = []
    for path in paths:
        table, name = owner_of(path)
        if name in table:
            taken.append((table, name, table.pop(name)))
    try:
        import l0hooks  # noqa: F401
    finally:
        for table, name, value in taken:
            table[name] = value


def gated(granularity: Literal["weight", "output"] = "weight") -> nn.Sequential:
    import l0hooks

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8))
    l0hooks.sparsify(model, granularity)
    return model.train()


def numbers(model: nn.Module, *outputs: Tensor) -> list[float]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [float(t.detach().double().sum()) for t in (*outputs, *grads)]


def train(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[float]:
    """Two steps; the two forwards before them see fresh noise, or this raises."""
    x = torch.linspace(-1, 1, 48).reshape(2, 24).requires_grad_()
    if torch.equal(model(x), model(x)):
        raise AssertionError("two forwards have the same noise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = run(x).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        found += numbers(model, loss)
        optimizer.step()
    return found


def training() -> list[float]:
    model = gated()
    return train(model, model)


def training_rows() -> list[float]:
    model = gated("output")
    return train(model, model)


def penalised() -> list[float]:
    import l0hooks

    model = gated()
    return train(model, lambda x: model(x).square().sum() + l0hooks.penalty(model, l0=1e-2))


def checkpointed() -> list[float]:
    model = gated()
    return train(model, lambda x: checkpoint(model, x, use_reentrant=False))


def checkpointed_reentrant() -> list[float]:
    model = gated()
    return train(model, lambda x: checkpoint(model, x, use_reentrant=True))


def evaluation() -> list[float]:
    model = gated().eval()
    with torch.no_grad():
        return numbers(model, model(torch.ones(2, 24)), model(torch.ones(2, 24)))


def pruning() -> list[float]:
    import l0hooks

    model = gated("output").eval()
    small = l0hooks.prune(model, example_inputs=(torch.ones(2, 24),))
    return numbers(small, small(torch.ones(2, 24)))


def functional() -> list[float]:
    model = gated()
    values = {k: p.detach() for k, p in model.named_parameters()}

    def loss(own: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(model, own, (torch.ones(2, 24),))
        return out.square().sum()

    return [float(g.double().sum()) for g in torch.func.grad(loss)(values).values()]


def forward_mode() -> list[float]:
    model = gated()
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(2, 24), torch.ones(2, 24))  # type: ignore[no-untyped-call]
        primal, tangent = torch.autograd.forward_ad.unpack_dual(model(x))  # type: ignore[no-untyped-call]
        return [float(part.detach().double().sum()) for part in (primal, tangent)]


CHECKS = (
    *(training, training_rows, penalised, checkpointed, checkpointed_reentrant),
    *(evaluation, pruning, functional, forward_mode),
)


def outcome(check: Callable[[], list[float]]) -> list[float] | str:
    try:
        return check()
    except Exception as error:  # noqa: BLE001  the error is the outcome
        return f"{type(error).__name__}: {error}"


def in_child(paths: Sequence[str]) -> dict[str, list[float] | str]:
    """The outcomes of all checks in a fork of this process."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        try:
            import_without(paths)
            found = {check.__name__: outcome(check) for check in CHECKS}
        except Exception as error:  # noqa: BLE001  the error is the outcome
            found = {"import": f"{type(error).__name__}: {error}"}
        with os.fdopen(sink, "w") as out:
            json.dump(found, out)
        os._exit(0)
    os.close(sink)
    with os.fdopen(source) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text)  # type: ignore[no-any-return]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("torch._dynamo", "numba"):  # once for all forks; torch imports the first in its own checkpointing
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    sys.stdout.write(
        json.dumps({argument: in_child(argument.split("+") if argument else ()) for argument in sys.argv[1:]})
    )
