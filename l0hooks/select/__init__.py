"""Gates that select samples or features, and subsets of samples that match all of them."""

from l0hooks.select.gates import FeatureGate, SampleGate
from l0hooks.select.hybrid import HybridGate
from l0hooks.select.item_gate import ItemGate
from l0hooks.select.matching import Match, match_samples

__all__ = ["FeatureGate", "HybridGate", "ItemGate", "Match", "SampleGate", "match_samples"]
