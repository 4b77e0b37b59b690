"""Mixtures: how the budget is shared between tasks. Pure maths on small tensors; no model, no data."""

from adapt_recipes.mixture.adapt import Adapt
from adapt_recipes.mixture.planned import AdaptPlanned
from adapt_recipes.mixture.static import fixed_weights, proportional, temperature, uniform

__all__ = ["Adapt", "AdaptPlanned", "fixed_weights", "proportional", "temperature", "uniform"]
