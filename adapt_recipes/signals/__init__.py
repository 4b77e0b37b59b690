"""What is measured on the model for a mixture to learn from."""

from adapt_recipes.signals.base_losses import BaseLosses
from adapt_recipes.signals.probe import Probe
from adapt_recipes.signals.train_losses import TrainLosses

__all__ = ["BaseLosses", "Probe", "TrainLosses"]
