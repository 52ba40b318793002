"""Gates on the weights of a model: what is gated, how, and what that amounts to."""

from l0hooks.attach._summary import summary
from l0hooks.attach.spec import GateSpec
from l0hooks.attach.summary_table import Summary, SummaryRow

__all__ = ["GateSpec", "Summary", "SummaryRow", "summary"]
