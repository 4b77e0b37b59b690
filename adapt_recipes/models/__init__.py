"""Builders of models that torchtune does not have, Hugging Face checkpoints, and the model as recipes use it."""

from adapt_recipes.models.adapters import train_adapters_alone
from adapt_recipes.models.architecture import huggingface_config
from adapt_recipes.models.from_folder import decoder_from_folder
from adapt_recipes.models.gemma3 import gemma3, gemma3_1b
from adapt_recipes.models.huggingface import HuggingFaceCheckpointer
from adapt_recipes.models.lora import with_lora
from adapt_recipes.models.qwen1_5 import qwen1_5_0_5b
from adapt_recipes.models.qwen3 import qwen3, qwen3_0_6b
from adapt_recipes.models.token_losses import TokenLosses, check_decoder

# Last: it needs all of the above.
from adapt_recipes.models.build import build, prepare, round_as_saved, save  # isort: skip

__all__ = [
    "HuggingFaceCheckpointer",
    "TokenLosses",
    "build",
    "check_decoder",
    "decoder_from_folder",
    "gemma3",
    "gemma3_1b",
    "huggingface_config",
    "prepare",
    "qwen1_5_0_5b",
    "qwen3",
    "qwen3_0_6b",
    "round_as_saved",
    "save",
    "train_adapters_alone",
    "with_lora",
]
