"""Signals: measurements of the model from which a mixture learns."""

from adapt_recipes.signals.base_losses import BaseLosses, BaseWeights
from adapt_recipes.signals.levels import Levels, LevelsConfig
from adapt_recipes.signals.probe import Probe
from adapt_recipes.signals.train_losses import TrainLosses

__all__ = ["BaseLosses", "BaseWeights", "Levels", "LevelsConfig", "Probe", "TrainLosses"]
