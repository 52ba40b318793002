"""The budget as a constraint of the loss: multipliers that the optimiser raises while it lowers everything else.

With E the expected size, B the scheduled one and W the size of the whole, ``penalty(model, budget=1.0)`` is

- for ``constraint="inequality"``: λ·(E − B)/W with λ ≥ 0, and λ ← 0 whenever E ≤ B (a dual restart);
- for ``constraint="equality"``: λ₁·(s − t) + λ₂·(s − t)² with the sparsities s = 1 − E/W and t = 1 − B/W.

References
----------
Gallego-Posada, Ramirez, Erraqabi, Bengio & Lacoste-Julien (2022), Controlled sparsity via constrained optimization;
Wang, Wohlwend & Lei (2020), Structured pruning of large language models; Xia, Zhong & Chen (2022), Structured pruning
learns compact and accurate models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from l0hooks.errors import StateError, explain
from l0hooks.gates.gate import Gate
from l0hooks.gates.protocols import OptimizedGate
from l0hooks.training.budget import Budget
from l0hooks.training.budget_rule import BudgetRule
from l0hooks.training.size import Size


class LagrangianRule(BudgetRule):
    """Holds the gates of one ``Budget(method="lagrangian")`` together; :func:`set_budget` makes it.

    Attributes
    ----------
    budget : Budget
    gates : tuple of Gate
    size : Size
    equality : bool
        Whether the constraint is an equality.

    Examples
    --------
    >>> from l0hooks import param_groups, penalty, set_budget
    >>> gate = Gate(100)
    >>> budget = Budget(sparsity=0.8, steps=300, method="lagrangian", constraint="equality")
    >>> (rule,) = set_budget(gate, budget)
    >>> optimizer = torch.optim.Adam(param_groups(gate, lr=0.0, gate_lr=0.1))
    >>> for _ in range(300):
    ...     optimizer.zero_grad()
    ...     (penalty(gate, budget=1.0) - gate.expected_l0() / 200).backward()
    ...     optimizer.step()
    >>> int(gate.support().sum()), 18 < rule.expected() < 22
    (20, True)
    """

    limits = None

    def __init__(self, budget: Budget, gates: Sequence[Gate], size: Size) -> None:
        super().__init__(budget, gates, size)
        self.equality = budget.constraint == "equality"

    def add_multipliers(self) -> None:
        """Give the first gate the multipliers, at zero."""
        zeros = torch.zeros(2 if self.equality else 1, dtype=torch.float32, device=self.gates[0].log_alpha.device)
        self.gates[0].multipliers = nn.Parameter(zeros)

    @property
    def multipliers(self) -> nn.Parameter:
        """λ, or λ₁ and λ₂."""
        if self.gates[0].multipliers is None:
            raise StateError(explain("budget", "the first gate must hold the multipliers.", got="none"))
        return self.gates[0].multipliers

    def excess(self) -> Tensor:
        """(E − B)/W, differentiable, shape ()."""
        whole, size, like = self.size.whole, self.size, self.gates[0].log_alpha
        probabilities = [gate.keep_prob() for gate in self.gates]
        linear, square = (like.new_tensor(part / whole) for part in (size.linear, size.square))
        kept = torch.stack([p.sum().to(like.device) for p in probabilities])
        excess: Tensor = (linear * kept).sum() + (size.constant - self.scheduled) / whole
        if not size.square.any():  # nor are there cubes then
            return excess
        variance = torch.stack([(p * (1 - p)).sum().to(like.device) for p in probabilities])
        # no matrix products: autocast would run them in half precision
        excess = excess + (square * kept * kept[:, None]).sum() + (square.diagonal() * variance).sum()
        return excess + size.cubes.expected(kept, variance) / whole if len(size.cubes.layers) else excess

    def penalty(self) -> Tensor:
        """The term for the loss; once the support is fixed, 0."""
        if self.finished:  # distributed training wants to see every parameter used
            return (torch.zeros_like(self.multipliers) * self.multipliers).sum()
        excess = self.excess()
        if self.equality:
            return (torch.stack([-excess, excess.square()]) * self.multipliers).sum()
        return self.multipliers[0] * excess

    def before_step(self) -> None:
        """Leave the gradient as it is; once the support is fixed, remove it."""
        if self.finished:
            super().before_step()
            self.multipliers.grad = None

    def after_step(self, moved: Sequence[OptimizedGate]) -> None:
        """Count an optimiser's step, if the budget is to count them itself."""
        in_loss = self.multipliers.grad is not None or not self.multipliers.requires_grad
        if not in_loss and not self.finished:
            raise StateError(
                explain(
                    "optimizer.step",
                    "the loss must hold the penalty of the budget.",
                    got="multipliers without a gradient",
                    hint="loss + penalty(model, budget=1.0)",
                )
            )
        super().after_step(moved)

    def after_ascent(self) -> None:
        """Project the multipliers: not negative, and zero once an inequality holds."""
        with torch.no_grad():
            if self.equality:
                self.multipliers[1].clamp_(min=0)
            elif self.expected() <= self.scheduled:
                self.multipliers.zero_()
            else:
                self.multipliers.clamp_(min=0)

    def _settle(self) -> None:
        """Do nothing: the optimiser alone moves the gates."""
