"""Models that torchtune lacks a builder for, their checkpoints, and the form in which recipes use a model."""

from adapt_recipes.models.huggingface import HuggingFaceCheckpointer
from adapt_recipes.models.llama import llama_config, llama_from_folder
from adapt_recipes.models.token_losses import TokenLosses, check_decoder

__all__ = ["HuggingFaceCheckpointer", "TokenLosses", "check_decoder", "llama_config", "llama_from_folder"]
