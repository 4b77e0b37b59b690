"""Learn how much of each task to train on, while training, under an explicit budget of supervised tokens."""

__version__ = "0.1.0"
