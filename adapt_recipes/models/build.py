"""Builds the model of a config, checks it against the data, and for a run shards it and loads its first weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from adapt_recipes.config import TrainConfig
from adapt_recipes.data import Task, max_token
from adapt_recipes.models.adapters import train_adapters_alone
from adapt_recipes.models.architecture import huggingface_config
from adapt_recipes.models.huggingface import HuggingFaceCheckpointer, with_ends
from adapt_recipes.models.token_losses import TokenLosses, check_decoder
from adapt_recipes.training import precision
from adapt_recipes.training.process_group import raise_on_all_ranks, rank
from adapt_recipes.training.sharding import load_weights, on_meta, shard


def build(
    config: TrainConfig,
    tasks: Sequence[Task],
    *,
    device: torch.device,
    checkpointer: HuggingFaceCheckpointer | None,
) -> TokenLosses:
    """The model of a config, on one process and in training mode. No weight is read from a folder.

    Args:
        config: of the recipe.
        tasks: the data, whose token ids and lengths the model has to accept.
        device: of parameters that start from random values.
        checkpointer: its folder has to fit the model; the parameters are on the meta device until ``prepare``. None:
            they stay there, as in ``tune plan``.

    Raises:
        ValueError: the model cannot be built, cannot read the data, or does not fit the folder.
    """
    with raise_on_all_ranks():
        without_values = on_meta(checkpointer is None or checkpointer.config is not None)
        with training.set_default_dtype(precision.weights_dtype(config.dtype)), device, without_values:
            decoder = config.model.build()
        check_decoder(decoder, max_seq_len=config.max_seq_len, max_token=max_token(tasks))
        train_adapters_alone(decoder)
        if checkpointer is not None:
            checkpointer.check(decoder)
    if config.activation_checkpointing:
        training.set_activation_checkpointing(decoder, auto_wrap_policy={TransformerSelfAttentionLayer})
    return TokenLosses(
        decoder,
        compute_dtype=precision.compute_dtype(config.dtype),
        loss_chunk_tokens=config.loss_chunk_tokens,
        activation_offloading=config.activation_offloading,
    ).train()


def prepare(
    model: TokenLosses,
    config: TrainConfig,
    *,
    device: torch.device,
    checkpointer: HuggingFaceCheckpointer,
    load: bool,
) -> None:
    """Compiles a model, shards it over the processes, and loads the weights of its folder.

    Args:
        model: of ``build``.
        config: of the recipe.
        device: of this process.
        checkpointer: of ``build``.
        load: false: a checkpoint will be loaded instead.
    """
    if config.compile:
        training.compile_model(model.decoder, verbose=False)
    shard(model, model.decoder.layers, device=device, cpu_offload=config.fsdp_cpu_offload)
    if load and (weights := checkpointer.load()) is not None:
        load_weights(model.decoder, weights, seed=config.seed)
    # Of dropout.
    torch.manual_seed(config.seed + rank())


def save(model: TokenLosses, checkpointer: HuggingFaceCheckpointer, folder: Path, *, tokenizer: Any) -> None:
    """Writes the model as a Hugging Face folder, and its adapters, if it has any, to ``adapter`` in place of ``model``.

    The model itself is unchanged; see ``round_as_saved``.

    Args:
        model: of ``build``.
        checkpointer: of ``build``.
        folder: where; replaced if it exists.
        tokenizer: of the run; it writes its own files, and knows the tokens that end an answer.
    """
    token_ids = {"eos_token_id": with_ends(None, tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
    checkpointer.save(
        model.decoder.state_dict(),
        folder,
        config=checkpointer.config or huggingface_config(model.decoder, **token_ids),
        tokenizer=tokenizer,
        # A tokenizer of the user's own may not say which of its ends ends an answer.
        end_ids=getattr(tokenizer, "end_ids", tokenizer.eos_ids),
        adapters=train_adapters_alone(model.decoder),
    )


def round_as_saved(model: TokenLosses, checkpointer: HuggingFaceCheckpointer) -> bool:
    """Gives the model the weights that ``save`` has written of it: rounded, and with adapters merged.

    What is measured afterwards is measured of the saved model. Training cannot go on from it.

    Args:
        model: of ``build``.
        checkpointer: of ``build``.

    Returns:
        Whether anything changed; false: what was saved is bit for bit what was trained.
    """
    return checkpointer.round_as_saved(model.decoder, adapters=train_adapters_alone(model.decoder))
