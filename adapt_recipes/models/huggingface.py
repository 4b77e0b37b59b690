"""Loads the weights of a Hugging Face folder into a torchtune decoder, and saves a decoder as such a folder."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchtune.modules import TransformerDecoder

from adapt_recipes.data.conversations import error_prefix
from adapt_recipes.errors import warn
from adapt_recipes.files import atomic_folder, check_not_lfs
from adapt_recipes.models.adapters import Adapters, merged
from adapt_recipes.models.architecture import (
    architecture_of_config,
    architecture_of_decoder,
    check_length,
    is_dynamic,
    read_config,
)
from adapt_recipes.models.families import (
    FAMILIES,
    Family,
    huggingface_name,
    is_adapter,
    peft_name,
    to_huggingface,
    to_torchtune,
    torchtune_name,
)
from adapt_recipes.training.process_group import all_gather_object, raise_on_all_ranks, rank
from adapt_recipes.training.sharding import fill, full_tensor, to_local

StateDict = dict[str, Tensor]
SaveDType = Literal["stored", "fp32", "bf16", "fp16"]

_KEY = "checkpointer.checkpoint_dir"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_GENERATION_CONFIG = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# By the names that safetensors uses.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SAVE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The key of ``config.json`` that says it: of transformers 4, which 5 also reads, and of 5.
_DTYPE_KEYS = ("torch_dtype", "dtype")
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_QUANTIZATION = "quantization_config"
# Stored in old folders, and ignored.
_COMPUTED = "rotary_emb.inv_freq"


class Saveable(Protocol):
    """A tokenizer."""

    def save(self, folder: Path) -> None: ...


class _Stored(NamedTuple):
    """File, name there, dtype and shape of a weight, from the header of its file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class HuggingFaceCheckpointer:
    """Reads the weights from which training starts, and writes a folder that transformers loads.

    The headers of all files are checked at once, without reading a weight.

    Args:
        checkpoint_dir: a folder with ``config.json`` and either ``model.safetensors`` or an index and its shards; None:
            training starts from random weights.
        save_dtype: of the weights that ``save`` writes. ``stored``: each in the dtype that it has in
            ``checkpoint_dir``, so that a bf16 model stays one in whatever dtype it was trained, and in fp32 without a
            folder.

    Attributes:
        config: the folder's ``config.json``, without a ``quantization_config`` that its weights contradict; None
            without a folder.

    Raises:
        ValueError: the folder or a file in it is missing or cannot be used.
    """

    def __init__(self, checkpoint_dir: str | None, save_dtype: SaveDType = "stored") -> None:
        self.config: dict[str, Any] | None = None
        self._checkpoint_dir, self._save_dtype = checkpoint_dir, save_dtype
        self._generation_config: str | None = None
        # The folder's weights, by Hugging Face's names.
        self._stored: dict[str, _Stored] = {}
        if checkpoint_dir is None:
            return
        folder = Path(checkpoint_dir)
        self.config = read_config(folder, key=_KEY)
        self._architecture = architecture_of_config(self.config, where=f"{_KEY}: {folder / 'config.json'}")
        if (folder / _GENERATION_CONFIG).exists():
            # The text, because the file is copied as it is if nothing in it changes.
            read_config(folder, key=_KEY, name=_GENERATION_CONFIG)
            self._generation_config = (folder / _GENERATION_CONFIG).read_text(encoding="utf-8")
        family = FAMILIES[self._architecture.model_type]
        # After an error about weights that are quantized.
        advice = f"; its {_QUANTIZATION} says that they are quantized: use the folder of the model before that"
        advice = "" if self.config.get(_QUANTIZATION) is None else advice
        for file in _weight_files(folder):
            for name, stored in _read_header(file, advice=advice).items():
                if torchtune_name(family, name) is not None:
                    self._stored[name] = stored
                elif not name.endswith(_COMPUTED):
                    reason = f"{name} of shape {stored.shape} has no place in the model of its config.json{advice}"
                    raise ValueError(f"{_KEY}: {file}: {reason}")
        if advice:
            warn(f"{_KEY}: {folder / 'config.json'} has a {_QUANTIZATION}, but its weights are plain; it is dropped")
        self.config.pop(_QUANTIZATION, None)
        # Some folders of tied models store the head alone.
        if self._architecture.tie_word_embeddings and _EMBEDDINGS not in self._stored and _HEAD in self._stored:
            self._stored[_EMBEDDINGS] = self._stored.pop(_HEAD)

    def check(self, decoder: TransformerDecoder) -> None:
        """Refuses a decoder that the folder's weights do not fit, or that would compute another function with them.

        No weight is read. Without a folder every decoder is accepted.

        Args:
            decoder: its adapters are ignored, because no folder has any.

        Raises:
            ValueError: one line with the first weight of another shape, the first missing and the first unexpected one,
                by Hugging Face's names; or the first other difference, by its name in ``config.json``.
        """
        if self.config is None:
            return
        ours, theirs = architecture_of_decoder(decoder), self._architecture
        unfit = f"{_KEY}: {self._checkpoint_dir} does not fit the model"
        if ours.model_type != theirs.model_type:
            raise ValueError(f"{unfit}: its model_type is '{theirs.model_type}', and the model's '{ours.model_type}'")

        # Names and shapes.
        family = FAMILIES[ours.model_type]
        shapes = {
            str(huggingface_name(family, key)): tuple(weight.shape)
            for key, weight in decoder.state_dict().items()
            if not is_adapter(key)
        }
        # ``load`` checks a stored head of a tied model.
        stored = dict(self._stored)
        if theirs.tie_word_embeddings:
            stored.pop(_HEAD, None)
        problems = []
        for name, shape in shapes.items():
            if name in stored and stored[name].shape != shape:
                problems.append(f"{name} is {stored[name].shape} in the folder and {shape} in the model")
                break
        for text, names in (
            ("the folder lacks", [name for name in shapes if name not in stored]),
            ("the model has no", [name for name in stored if name not in shapes]),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                problems.append(f"{text} {names[0]}{more}")

        # Other settings.
        if is_dynamic(self.config):
            check_length(self.config, decoder.max_seq_len, where=unfit)
        if not problems and (field := theirs.first_difference(ours)):
            problems.append(
                f"{field} is {getattr(theirs, field)} in its config.json and {getattr(ours, field)} in the model"
            )
        if problems:
            raise ValueError(f"{unfit}: {'; '.join(problems)}")

    def load(self) -> Mapping[str, Tensor] | None:
        """The folder's weights by torchtune's names, in their stored dtypes; None without a folder.

        Weights are read lazily. A weight whose rows are not permuted is a memory map of the file.

        Raises:
            ValueError: the weights contradict ``config.json``.
        """
        if self.config is None:
            return None
        family = FAMILIES[self._architecture.model_type]
        weights = _Weights(
            {str(torchtune_name(family, name)): (stored.name, stored.file) for name, stored in self._stored.items()},
            family,
            self._architecture.head_dim,
        )
        # Some folders of tied models store the head as well. It is ignored if it equals the embeddings.
        if self._architecture.tie_word_embeddings and "output.weight" in weights:
            if not torch.equal(weights["output.weight"], weights["tok_embeddings.weight"]):
                reason = f"config.json says tie_word_embeddings, but {_HEAD} and {_EMBEDDINGS} differ"
                raise ValueError(f"{_KEY}: {self._checkpoint_dir}: {reason}")
            del weights.where["output.weight"]
        return weights

    def save(
        self,
        state_dict: Mapping[str, Tensor],
        folder: Path,
        *,
        config: Mapping[str, Any],
        tokenizer: Saveable,
        end_ids: Sequence[int] = (),
        adapters: Adapters | None = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Writes a Hugging Face folder atomically. All processes call this, and the first one writes.

        The weights are rounded to ``save_dtype``, and ``config.json`` names it. A tied head is not stored.

        Adapters are merged into the weights, and also written for PEFT, unmerged, to ``adapter_folder``. In ``folder``
        itself, transformers with PEFT installed would add them to the weights a second time.

        Args:
            state_dict: the decoder's, on any device. Sharded weights are gathered one at a time, and the first process
                holds those of one file.
            folder: replaced if it exists.
            config: this checkpointer's ``config``, or ``huggingface_config`` of a decoder that came from no folder.
            tokenizer: writes its own files into a folder.
            end_ids: of the tokens that end an answer. Generation stops at them: they are added to the ``eos_token_id``
                of ``config.json`` and of ``generation_config.json``.
            adapters: the return value of ``train_adapters_alone``.
            max_shard_size: of one file of weights, in bytes or as "5GB".

        Raises:
            NoSpaceLeft: the disk is full; nothing is left behind.
        """
        architecture = architecture_of_config(config, where="config")
        family, head_dim = FAMILIES[architecture.model_type], architecture.head_dim
        # Shapes and dtypes only; the weights themselves are converted one file at a time.
        plan: StateDict = {}
        sources: dict[str, str] = {}
        for key, weight in state_dict.items():
            if not is_adapter(key):
                name = huggingface_name(family, key)
                assert name is not None, key
                plan[name] = torch.empty(weight.shape, dtype=self._saved_dtype(name), device="meta")
                sources[name] = key
        split = split_torch_state_dict_into_shards(plan, max_shard_size=max_shard_size)

        # In the order in which they are written, then the adapters.
        keys = [sources[name] for names in split.filename_to_tensors.values() for name in names]
        keys += filter(is_adapter, state_dict)
        weights = _converted(state_dict, keys, plan, family, adapters, head_dim=head_dim)
        with raise_on_all_ranks():
            try:
                if rank() == 0:
                    self._write(folder, weights, split, self._with_dtype(config), tokenizer, end_ids)
                    if adapters is not None:
                        self._write_adapters(adapter_folder(folder), dict(weights), adapters)
            finally:
                # The other processes take part in every gather, and so does the first one after an error.
                deque(weights, maxlen=0)

    @torch.no_grad()
    def round_as_saved(self, decoder: TransformerDecoder, *, adapters: Adapters | None = None) -> bool:
        """Gives a decoder the weights that ``save`` writes of it, in the decoder's own dtype. All processes call this.

        The decoder then computes what the folder does: adapters are merged, and their B is 0.

        Args:
            decoder: sharded or not; one weight at a time is gathered if it has an adapter.
            adapters: the return value of ``train_adapters_alone``.

        Returns:
            Whether anything changed, on any process.
        """
        family = FAMILIES[architecture_of_decoder(decoder).model_type]
        state_dict, changed = decoder.state_dict(), False
        for key, weight in state_dict.items():
            if is_adapter(key):
                continue
            before = to_local(weight).clone()
            dtype = self._saved_dtype(str(huggingface_name(family, key)))
            parts = _names_of_parts(key, state_dict)
            if len(parts) == 1:
                to_local(weight).copy_(before.to(dtype))
            else:
                # On the CPU, as in ``save``: another device adds in another order.
                whole = {part: full_tensor(state_dict[part]).cpu() for part in parts}
                fill(weight, merged(key, whole, adapters).to(dtype))
                b = to_local(state_dict[parts[-1]])
                changed |= bool(b.any())
                b.zero_()
            changed |= not torch.equal(to_local(weight), before)
        return any(all_gather_object(changed))

    def _saved_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a weight is saved, by Hugging Face's name."""
        if self._save_dtype != "stored":
            return _SAVE_DTYPES[self._save_dtype]
        return self._stored[name].dtype if name in self._stored else torch.float32

    def _with_dtype(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._save_dtype == "stored":
            return config
        keys = [key for key in _DTYPE_KEYS if key in config] or _DTYPE_KEYS[:1]
        return {**config, **dict.fromkeys(keys, str(_SAVE_DTYPES[self._save_dtype]).removeprefix("torch."))}

    def _write(
        self,
        folder: Path,
        weights: Iterator[tuple[str, Tensor]],
        split: StateDictSplit,
        config: Mapping[str, Any],
        tokenizer: Saveable,
        end_ids: Sequence[int],
    ) -> None:
        with atomic_folder(folder) as partial:
            _write_json(partial / "config.json", _stopping(config, end_ids))
            for file, names in split.filename_to_tensors.items():
                _write_weights(partial / file, dict(islice(weights, len(names))), readable_as=partial / "config.json")
            if split.is_sharded:
                _write_json(partial / _INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
            self._write_generation_config(partial / _GENERATION_CONFIG, config, end_ids)
            tokenizer.save(partial)

    def _write_generation_config(self, file: Path, config: Mapping[str, Any], end_ids: Sequence[int]) -> None:
        text = self._generation_config
        before = {} if text is None else json.loads(text)
        after = before
        if end_ids:
            # Where the file names no end, that of config.json counts.
            names = () if before.get("eos_token_id") is not None else _TOKEN_IDS
            ids = {name: config[name] for name in names if config.get(name) is not None}
            after = _stopping(ids | before, end_ids)
        if after != before:
            _write_json(file, after)
        elif text is not None:
            file.write_text(text, encoding="utf-8")

    def _write_adapters(self, folder: Path, weights: StateDict, adapters: Adapters) -> None:
        with atomic_folder(folder) as partial:
            adapter_config = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                # PEFT takes a path that is not in the folder from which it is called for a name on the hub.
                "base_model_name_or_path": self._checkpoint_dir and os.path.abspath(self._checkpoint_dir),
                "target_modules": sorted({name.split(".lora_")[0].split(".")[-1] for name in weights}),
                "r": adapters.rank,
                "lora_alpha": adapters.alpha,
                "lora_dropout": adapters.dropout,
                "bias": "none",
                "inference_mode": True,
            }
            _write_json(partial / _ADAPTER_CONFIG, adapter_config)
            _write_weights(partial / _ADAPTER, weights, readable_as=partial / _ADAPTER_CONFIG)


def adapter_folder(folder: Path) -> Path:
    """The folder of the adapters of a saved model, beside it: its name has ``adapter`` for ``model``, or at its end."""
    name = folder.name.replace("model", "adapter")
    return folder.with_name(name if name != folder.name else f"{name}_adapter")


def with_ends(eos_token_id: int | list[int] | None, end_ids: Sequence[int]) -> int | list[int] | None:
    """Adds ids to an ``eos_token_id``: first those that it lacks. It stays as it is if it lacks none."""
    ids = eos_token_id if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]
    missing = [end for end in end_ids if end not in ids]
    if not missing:
        return eos_token_id
    ids = [*missing, *ids]
    return ids if len(ids) > 1 else ids[0]


def _stopping(settings: Mapping[str, Any], end_ids: Sequence[int]) -> dict[str, Any]:
    """The settings, with ``end_ids`` in their ``eos_token_id``."""
    if not end_ids:
        return dict(settings)
    return {**settings, "eos_token_id": with_ends(settings.get("eos_token_id"), end_ids)}


def _names_of_parts(key: str, state_dict: Mapping[str, Tensor]) -> list[str]:
    """The name of a weight, and those of its adapter's A and B if it has one."""
    projection = key.removesuffix(".weight")
    names = (key, f"{projection}.lora_a.weight", f"{projection}.lora_b.weight")
    return [name for name in names if name in state_dict]


def _converted(
    state_dict: Mapping[str, Tensor],
    keys: Sequence[str],
    plan: Mapping[str, Tensor],
    family: Family,
    adapters: Adapters | None,
    *,
    head_dim: int,
) -> Iterator[tuple[str, Tensor]]:
    """The weights ``keys`` by their names in the folder, gathered, merged, and in the dtypes of ``plan``.

    All processes iterate over it, because they take part in every gather; only the first one gets values.
    """
    for key in keys:
        needed = {part: full_tensor(state_dict[part]) for part in _names_of_parts(key, state_dict)}
        if rank() == 0:
            weight = merged(key, {part: each.cpu() for part, each in needed.items()}, adapters)
            name = peft_name(family, key) if is_adapter(key) else str(huggingface_name(family, key))
            weight = weight.to(plan[name].dtype) if name in plan else weight
            yield name, to_huggingface(family, key, weight, head_dim=head_dim)
        else:
            yield key, torch.empty(0)


class _Weights(Mapping[str, Tensor]):
    """The weights of a folder, read lazily.

    Args:
        where: torchtune's names -> Hugging Face's, and the file.
        family, head_dim: of the decoder.
    """

    def __init__(self, where: dict[str, tuple[str, Path]], family: Family, head_dim: int) -> None:
        self.where, self._family, self._head_dim = where, family, head_dim

    def __getitem__(self, key: str) -> Tensor:
        name, file = self.where[key]
        with safe_open(file, framework="pt") as weights:
            return to_torchtune(self._family, key, weights.get_tensor(name), head_dim=self._head_dim)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. A single file takes precedence over an index, as in transformers."""
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.exists():
        reason = f"there is neither {_SINGLE} nor {_INDEX} in {folder}"
        if any(folder.glob("pytorch_model*.bin*")):
            reason += "; pytorch_model.bin is an old format, which is not supported: save it again with transformers"
        raise ValueError(f"{_KEY}: {reason}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{_KEY}: {index} is not the index of a sharded model ({reason})") from None
    for file in files:
        if not file.is_file():
            raise ValueError(f"{_KEY}: {index} names {file.name}, but there is no such file in {folder}")
    return files


def _read_header(file: Path, *, advice: str) -> dict[str, _Stored]:
    """Every weight in a file, by name."""
    with error_prefix(_KEY):
        check_not_lfs(file)
    try:
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (not a dict)
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{_KEY}: {file} cannot be read as safetensors: {error}") from None
    for name, (dtype, _) in found.items():
        if dtype not in _DTYPES:
            raise ValueError(
                f"{_KEY}: {file}: {name} is stored as {dtype}, which cannot be trained; allowed: {', '.join(_DTYPES)}"
                f"{advice}"
            )
    return {name: _Stored(file, name, _DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}


def _write_weights(file: Path, weights: Mapping[str, Tensor], *, readable_as: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file, metadata={"format": "pt"})
    # safetensors creates files that only the owner can read.
    shutil.copymode(readable_as, file)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
