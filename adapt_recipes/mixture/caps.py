"""Shares under caps: UniMax (Chung et al. 2023, arXiv 2304.09151) for any mixture.

UniMax spends a budget as evenly as it can while no corpus is read more than a number of epochs: whoever has less than
its share is read to the cap, and the others share the rest. This is the waterfilling of a uniform p; here p may be any.
"""

from __future__ import annotations

import torch
from torch import Tensor


def capped(
    probabilities: Tensor,  # (num_tasks,) float64, on the simplex
    caps: Tensor,  # (num_tasks,) int64, the most supervised tokens that each task may still get
    budget: int,  # supervised tokens left to spend, > 0; not more than the sum of the caps
) -> Tensor:
    """``probabilities``, changed so that no task gets more than its cap until the budget is spent (waterfilling).

    ``min(caps / budget, scale * probabilities)``, with the ``scale`` for which it sums to 1: a capped task reaches its
    cap when the budget ends, and the others keep their proportions. Tasks of probability 0 get something only if all
    others are capped, and then in proportion to their caps. Exact, in at most ``num_tasks`` + 1 rounds.

    Returns:
        (num_tasks,) float64, on the simplex; ``probabilities`` itself if no cap is below the task's share.
    """
    assert 0 < budget <= int(caps.sum()), f"{budget} tokens cannot be spent under caps of {int(caps.sum())}"
    is_capped = torch.zeros_like(caps, dtype=torch.bool)
    while True:
        rest = budget - int(caps[is_capped].sum())
        weights = probabilities if probabilities[~is_capped].any() else caps.double()
        shares = weights / weights[~is_capped].sum() if rest > 0 else torch.zeros_like(weights)
        tokens = torch.where(is_capped, caps, shares * rest)
        above = ~is_capped & (tokens > caps)
        if not above.any():
            return tokens / budget if is_capped.any() else probabilities
        # The rest is for fewer tasks now, so the scale can only grow: a capped task stays capped.
        is_capped |= above
