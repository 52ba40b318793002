"""Gates that select samples and features, and samples that match a whole."""

from l0hooks.select.gates import FeatureGate, SampleGate
from l0hooks.select.hybrid import HybridGate
from l0hooks.select.item_gate import ItemGate
from l0hooks.select.matching import Match, match_samples

__all__ = ["FeatureGate", "HybridGate", "ItemGate", "Match", "SampleGate", "match_samples"]
