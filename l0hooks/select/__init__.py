"""Gates that select samples or features, and ``match_samples``, which finds representative samples."""

from typing import TYPE_CHECKING, Any

from l0hooks.select.gates import FeatureGate, SampleGate
from l0hooks.select.hybrid import HybridGate
from l0hooks.select.item_gate import ItemGate

if TYPE_CHECKING:
    from l0hooks.select.matching import Match, match_samples

__all__ = ["FeatureGate", "HybridGate", "ItemGate", "Match", "SampleGate", "match_samples"]


def __getattr__(name: str) -> Any:
    if name not in ("Match", "match_samples"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # imported when first used: `import l0hooks` does not need it
    from l0hooks.select.matching import Match, match_samples

    return {"Match": Match, "match_samples": match_samples}[name]
