"""Mixtures: how the budget is shared between tasks. Pure maths on small tensors; no model, no data."""

from adapt_recipes.mixture.adapt import Adapt
from adapt_recipes.mixture.planned import AdaptPlanned
from adapt_recipes.mixture.static import FixedWeights, Proportional, Temperature, Uniform

__all__ = ["Adapt", "AdaptPlanned", "FixedWeights", "Proportional", "Temperature", "Uniform"]
