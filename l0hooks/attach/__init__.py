"""Gates on the weights of a model: what is gated, how, and what that amounts to."""

from l0hooks.attach._summary import summary
from l0hooks.attach.spec import GateSpec
from l0hooks.attach.summary_table import Summary, SummaryRow
from l0hooks.attach.walk import Gated, iter_gated

__all__ = ["GateSpec", "Gated", "Summary", "SummaryRow", "iter_gated", "summary"]
