"""What a benchmark is to the runner: a name, what it measures, and tables that say how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

Cell = float | str | None
Row = dict[str, Cell]
T = TypeVar("T")


@dataclass(frozen=True)
class Aim:
    """A figure that was asked for, and what was measured."""

    what: str
    got: float
    at_most: float

    def __str__(self) -> str:
        return f"{self.what}: {self.got:.3g}, asked at most {self.at_most:.3g}: {'met' if self.met else 'MISSED'}"

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.got <= self.at_most


@dataclass(frozen=True)
class Panel:
    """How a table is drawn: bars for every row, or lines over the column ``x``, one for each of ``y`` and of ``by``.

    ``log`` names the logarithmic axes.
    """

    kind: Literal["bars", "lines"]
    y: tuple[str, ...]
    label: str
    x: str = ""
    by: str = ""
    log: Literal["", "x", "y", "xy"] = ""
    reference: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows under a title; the first column names them."""

    title: str
    rows: list[Row]
    panel: Panel | None = None
    aims: list[Aim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Table:
        """What ``asdict`` made of one."""
        panel = told["panel"] and Panel(**(told["panel"] | {"y": tuple(told["panel"]["y"])}))
        return cls(told["title"], told["rows"], panel, [Aim(**aim) for aim in told["aims"]], told["notes"])

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    def columns(self) -> list[str]:
        """The names of all columns, in the order in which rows bring them."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


@dataclass(frozen=True)
class Scale:
    """How much to run: a smoke run, what is usual, or the sizes that take minutes and gigabytes as well."""

    quick: bool = False
    large: bool = False

    def repeats(self, usual: int) -> int:
        """As many as usual, or three."""
        return 3 if self.quick else usual

    def of(self, quick: Sequence[T], usual: Sequence[T], large: Sequence[T] = ()) -> list[T]:
        """The sizes to run."""
        return list(quick) if self.quick else [*usual, *(large if self.large else ())]


@dataclass(frozen=True)
class Benchmark:
    """One registered measurement.

    ``missing`` says why it cannot run here, or nothing; ``long`` ones run only when they are named.
    """

    name: str
    about: str
    measure: Callable[[Scale], list[Table]]
    missing: Callable[[], str | None] = lambda: None
    long: bool = False


REGISTRY: dict[str, Benchmark] = {}


def register(
    name: str, about: str, *, missing: Callable[[], str | None] = lambda: None, long: bool = False
) -> Callable[[Callable[[Scale], list[Table]]], Callable[[Scale], list[Table]]]:
    """Make a function from a scale to tables known to the runner."""

    def enter(measure: Callable[[Scale], list[Table]]) -> Callable[[Scale], list[Table]]:
        if name in REGISTRY:
            raise ValueError(f"two benchmarks are called {name!r}")
        REGISTRY[name] = Benchmark(name, about, measure, missing, long)
        return measure

    return enter
