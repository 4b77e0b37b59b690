"""Builders of models that torchtune does not have, Hugging Face checkpoints, and the model as recipes use it."""

from adapt_recipes.models.adapters import train_adapters_alone
from adapt_recipes.models.architecture import huggingface_config
from adapt_recipes.models.gemma3 import gemma3, gemma3_1b, lora_gemma3, lora_gemma3_1b
from adapt_recipes.models.huggingface import HuggingFaceCheckpointer
from adapt_recipes.models.llama import llama_from_folder
from adapt_recipes.models.lora import add_lora
from adapt_recipes.models.qwen1_5 import lora_qwen1_5_0_5b, qwen1_5_0_5b
from adapt_recipes.models.qwen3 import lora_qwen3, lora_qwen3_0_6b, qwen3, qwen3_0_6b
from adapt_recipes.models.token_losses import TokenLosses, check_decoder

# Last: it needs all of the above.
from adapt_recipes.models.build import build, prepare, save  # isort: skip

__all__ = [
    "HuggingFaceCheckpointer",
    "TokenLosses",
    "add_lora",
    "build",
    "check_decoder",
    "gemma3",
    "gemma3_1b",
    "huggingface_config",
    "llama_from_folder",
    "prepare",
    "lora_gemma3",
    "lora_gemma3_1b",
    "lora_qwen1_5_0_5b",
    "lora_qwen3",
    "lora_qwen3_0_6b",
    "qwen1_5_0_5b",
    "qwen3",
    "qwen3_0_6b",
    "save",
    "train_adapters_alone",
]
