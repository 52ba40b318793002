"""From a gated model to a plain, smaller one, and to files."""

from l0hooks.export._prune import prune
from l0hooks.export.save import load_pruned, save_pruned

__all__ = ["load_pruned", "prune", "save_pruned"]
