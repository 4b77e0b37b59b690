"""Mixtures: the shares of the tasks in the budget. Computed on small tensors, without the model or the data."""

from adapt_recipes.mixture.adapt import Adapt
from adapt_recipes.mixture.adapt_ksteps import AdaptKSteps
from adapt_recipes.mixture.ado import Ado
from adapt_recipes.mixture.bandit import Exp3
from adapt_recipes.mixture.dro import GroupDRO
from adapt_recipes.mixture.dynamix import Dynamix
from adapt_recipes.mixture.famo import Famo
from adapt_recipes.mixture.forecast import AdaptForecast
from adapt_recipes.mixture.grape import Grape
from adapt_recipes.mixture.pike import Pike
from adapt_recipes.mixture.planned import AdaptPlanned
from adapt_recipes.mixture.scorer import Scorer
from adapt_recipes.mixture.staged import Staged
from adapt_recipes.mixture.static import fixed_weights, proportional, temperature, uniform

__all__ = [
    "Adapt",
    "AdaptForecast",
    "AdaptKSteps",
    "AdaptPlanned",
    "Ado",
    "Dynamix",
    "Exp3",
    "Famo",
    "Grape",
    "GroupDRO",
    "Pike",
    "Scorer",
    "Staged",
    "fixed_weights",
    "proportional",
    "temperature",
    "uniform",
]
