"""How many tokens each layer keeps, if it follows from the policy (and its recipe) and the prompt's length alone."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from trt_kv.errors import UsageError
from trt_kv.policy import Policy, kept_tokens


@dataclass(frozen=True, kw_only=True)
class LayerBudget:
    """A layer keeps ``share`` (in [0, 1]) of its tokens, plus ``tokens`` (which may be negative), but at least ``floor``."""

    share: float
    tokens: int = 0
    floor: int = 0

    def of(self, n_cached: int) -> int:
        """Tokens kept of ``n_cached``, at least one, without regard to protected ones."""
        return kept_tokens(n_cached, self.share, self.tokens, max(1, self.floor))

    def of_prompt(self, n_prompt: int) -> int:
        """Tokens that a step may attend to with a host-resident cache; may exceed the length of the prompt."""
        return kept_tokens(n_prompt, self.share) + self.tokens


ALL = LayerBudget(share=1.0)


def layer_budgets(policy: Policy, n_layers: int, kept_shares: Sequence[float] | None = None) -> list[LayerBudget]:
    """One budget per layer, with the policy's floor.

    ``kept_shares``: a recipe's share of each layer; None: every layer keeps ``policy.kept``. Exempt layers keep everything.
    With budgets "unimetric" and "above" all layers do, until the budget is computed from the input.
    ``UsageError`` for an exempt layer that the model does not have.
    """
    check_exempt_layers(policy, n_layers)
    match policy.budget:
        case "constant":
            budgets = [LayerBudget(share=0.0, tokens=policy.tokens)] * n_layers
        case "pyramid":
            n_counted = n_layers - len(policy.exempt_layers)
            pyramid = iter(pyramid_budgets(policy.kept, n_counted, window=policy.recent, beta=policy.beta))
            budgets = [ALL if layer in policy.exempt_layers else next(pyramid) for layer in range(n_layers)]
        case "full" | "unimetric" | "above":
            budgets = [ALL] * n_layers
        case _:
            budgets = [LayerBudget(share=share) for share in kept_shares or [policy.kept] * n_layers]
    budgets = [dataclasses.replace(budget, floor=policy.eviction_floor) for budget in budgets]
    return [ALL if layer in policy.exempt_layers else budget for layer, budget in enumerate(budgets)]


def check_exempt_layers(policy: Policy, n_layers: int) -> None:
    """``UsageError`` for an exempt layer that a model of ``n_layers`` does not have."""
    missing = [layer for layer in policy.exempt_layers if layer >= n_layers]
    if missing:
        raise UsageError(
            "the policy exempts layers that the model does not have",
            got=missing,
            expected=f"layers 0 .. {n_layers - 1}",
            fix="name existing layers with --set exempt_layers=..., or exempt none with --set exempt_layers=none",
        )


def pyramid_budgets(kept: float, n_layers: int, *, window: int, beta: float) -> list[LayerBudget]:
    """PyramidKV's budgets (arXiv 2406.02069, section 3.2): beyond the protected ``window``, linear from first to last layer.

    With c = kept * n: the last layer keeps (c - window) / beta, the first 2 (c - window) minus that, each plus the window, so
    that the mean is c. Where the first layer would keep more than there is (kept > beta / (2 beta - 1)), it keeps all and the
    last one 2 c - n.
    """
    if n_layers == 1:
        return [LayerBudget(share=kept)]
    depths = [layer / (n_layers - 1) for layer in range(n_layers)]
    if kept > beta / (2 * beta - 1):
        return [LayerBudget(share=1.0 - 2.0 * depth * (1.0 - kept)) for depth in depths]
    factors = [(2 - 1 / beta) - depth * (2 - 2 / beta) for depth in depths]
    return [LayerBudget(share=factor * kept, tokens=round(window * (1 - factor))) for factor in factors]
