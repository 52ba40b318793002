"""Hard Concrete gates: their distribution, their noise, and ``Gate``."""

from l0hooks.gates.distribution import HardConcrete
from l0hooks.gates.gate import Gate, iter_gates, set_temperature

__all__ = ["Gate", "HardConcrete", "iter_gates", "set_temperature"]
