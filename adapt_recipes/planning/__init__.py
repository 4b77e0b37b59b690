"""``tune plan``: what a run would do and need, computed from its config before it starts."""

from adapt_recipes.planning.memory import Memory, estimate_memory
from adapt_recipes.planning.new import write_config
from adapt_recipes.planning.pilot import Pilot, run_pilot, show_pilot
from adapt_recipes.planning.plan import Plan, make_plan, show

__all__ = ["Memory", "Pilot", "Plan", "estimate_memory", "make_plan", "run_pilot", "show", "show_pilot", "write_config"]
