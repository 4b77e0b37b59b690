"""Opens a Hugging Face folder in lm-eval, and says what else an evaluation depends on."""

from __future__ import annotations

import hashlib
import random
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from adapt_recipes.errors import check_installed

Backend = Literal["hf", "vllm"]
_PACKAGES = ("lm_eval", "accelerate", "transformers", "rouge_score")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def check_backend(backend: Backend) -> None:
    """Refuses to begin without lm-eval and what it needs for a backend.

    Raises:
        ValueError: one is missing; it says how to install it.
    """
    check_installed(_PACKAGES, extra="eval")
    if backend == "vllm" and find_spec("vllm") is None:
        raise ValueError("backend: vllm is not installed; pip install vllm, or choose backend: hf")


def open_model(
    folder: Path,
    *,
    tokenizer: Path,
    device: torch.device,
    dtype: Literal["fp32", "bf16"],
    batch_size: int,
    backend: Backend,
) -> Any:
    """The model in lm-eval, ``lm_eval.api.model.TemplateLM``.

    Args:
        folder: a Hugging Face folder.
        tokenizer: the folder of the tokenizer and its chat template.
        device: of this process.
        dtype: of the weights and of what is computed.
        batch_size: sequences in a forward pass.
        backend: of lm-eval; ``vllm`` chooses its device itself.
    """
    import transformers
    from lm_eval.api.registry import get_model

    transformers.utils.logging.disable_progress_bar()
    arguments = {"pretrained": str(folder), "tokenizer": str(tokenizer), "dtype": _DTYPES[dtype]}
    return get_model(backend).create_from_arg_obj(arguments, {"batch_size": batch_size, "device": str(device)})


def weights_fingerprint(folder: Path) -> str:
    """A hash of the weights in a Hugging Face folder.

    Raises:
        ValueError: there are none.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder}: holds no weights of a model (*.safetensors)")
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def set_seeds(seed: int) -> None:
    """Seeds all generators from which lm-eval draws."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Of the packages on which a score depends."""
    found = {}
    for package in ("adapt-recipes", "lm-eval", "transformers", "torch", "datasets", "rouge-score", "vllm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
