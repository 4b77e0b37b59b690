"""What a run would do and need, worked out from its config before it starts."""

from adapt_recipes.planning.memory import Memory, estimate_memory
from adapt_recipes.planning.plan import Plan, make_plan, show

__all__ = ["Memory", "Plan", "make_plan", "estimate_memory", "show"]
