"""Weights from a Hugging Face folder into a torchtune decoder, and back into such a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune.models import convert_weights
from torchtune.modules import TransformerDecoder

from adapt_recipes.errors import nearest
from adapt_recipes.models.llama import LlamaArchitecture, read_config
from adapt_recipes.training.checkpoint import written_whole

StateDict = dict[str, Tensor]

_KEY = "checkpointer.checkpoint_dir"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors spells them


class SavesItself(Protocol):
    """A tokenizer, as far as this module is concerned."""

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` of ``config.json`` is converted.

    Attributes:
        names: Hugging Face's names of the weights -> torchtune's, ``{}`` for a layer's number; None: nothing to train.
        architecture: reads what fixes the model's function off a config or a decoder.
        to_torchtune, to_huggingface: convert a state dict. They need the sizes of the attention, because the two sides
            pair the rows of query and key projections differently for the rotations.
    """

    names: Mapping[str, str | None]
    architecture: type[LlamaArchitecture]
    to_torchtune: Callable[..., StateDict]
    to_huggingface: Callable[..., StateDict]


FAMILIES = {
    "llama": Family(
        convert_weights._FROM_HF, LlamaArchitecture, convert_weights.hf_to_tune, convert_weights.tune_to_hf
    ),
}


class HuggingFaceCheckpointer:
    """Reads the weights that a training starts from, and writes the folder that transformers loads.

    Whatever a header can tell is checked here at once, without reading a weight.

    Args:
        checkpoint_dir: a folder with ``config.json`` and either ``model.safetensors`` or an index and its shards; None:
            the training starts from random weights.

    Attributes:
        config: the folder's ``config.json``; None without a folder.

    Raises:
        ValueError: a folder, or a file in it, that is missing or cannot be used.
    """

    def __init__(self, checkpoint_dir: str | None) -> None:
        self.config: dict[str, Any] | None = None
        self._generation_config: str | None = None
        self._files: list[Path] = []
        self._dtypes: dict[str, torch.dtype] = {}  # of the folder's weights, by Hugging Face's names
        if checkpoint_dir is None:
            return
        folder = Path(checkpoint_dir)
        self.config = read_config(folder, key=_KEY)
        _family(self.config, where=f"{_KEY}: {folder / 'config.json'}")
        if (generation_config := folder / "generation_config.json").exists():
            self._generation_config = generation_config.read_text(encoding="utf-8")
        self._files = _weight_files(folder)
        for file in self._files:
            self._dtypes |= _read_dtypes(file)

    def load(self) -> StateDict | None:
        """The folder's weights under torchtune's names, dtypes as stored; None without a folder.

        What is not permuted stays a memory map of the file, so that this costs little memory until it is read.

        Raises:
            ValueError: a weight that ``config.json`` has no place for.
        """
        if self.config is None:
            return None
        state_dict: StateDict = {}
        for file in self._files:
            weights = load_file(file)
            for key, weight in weights.items():
                try:
                    state_dict |= _convert(self.config, to="torchtune", weights={key: weight})
                except Exception as error:  # torchtune raises a bare one for an unknown name
                    reason = f"{key} of shape {tuple(weight.shape)} has no place in the model of its config.json"
                    raise ValueError(f"{_KEY}: {file}: {reason}") from error
        # Some tied folders hold the head as well. It is left out where that loses nothing.
        if self.config.get("tie_word_embeddings") and "output.weight" in state_dict:
            head = state_dict.pop("output.weight")
            if not torch.equal(head, state_dict["tok_embeddings.weight"]):
                reason = "config.json says tie_word_embeddings, but lm_head.weight and model.embed_tokens.weight differ"
                raise ValueError(f"{_KEY}: {self._files[0].parent}: {reason}")
        return state_dict

    def check(self, model_state_dict: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
        """Refuses weights that do not fit the model.

        Args:
            model_state_dict: the decoder's; only names and shapes are looked at.
            loaded: what ``load`` returned.

        Raises:
            ValueError: one line with the first weight of another shape, the first missing and the first surplus one,
                under Hugging Face's names.
        """
        assert self.config is not None
        config = self.config
        problems = []
        for key, weight in model_state_dict.items():
            if key in loaded and loaded[key].shape != weight.shape:
                shapes = f"is {tuple(loaded[key].shape)} in the folder and {tuple(weight.shape)} in the model"
                problems.append(f"{_huggingface_name(config, key)} {shapes}")
                break
        for what, keys in (
            ("the folder lacks", [key for key in model_state_dict if key not in loaded]),
            ("the model has no", [key for key in loaded if key not in model_state_dict]),
        ):
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                problems.append(f"{what} {_huggingface_name(config, keys[0])}{more}")
        if problems:
            raise ValueError(f"{_KEY}: {self._files[0].parent} does not fit the model: {'; '.join(problems)}")

    def check_architecture(self, decoder: TransformerDecoder) -> None:
        """Refuses a model that the weights fit and yet do not work in: with other rotations, heads or epsilon.

        Raises:
            ValueError: naming the first difference, as ``config.json`` calls it.
        """
        assert self.config is not None
        folder = self._files[0].parent
        family = _family(self.config, where=_KEY)
        theirs = family.architecture.from_config(self.config, where=f"{_KEY}: {folder / 'config.json'}")
        ours = family.architecture.from_decoder(decoder)
        if name := theirs.first_difference(ours):
            values = f"{name} is {getattr(theirs, name)} in its config.json and {getattr(ours, name)} in the model"
            raise ValueError(f"{_KEY}: {folder} does not fit the model: {values}")

    def save(
        self,
        state_dict: Mapping[str, Tensor],
        folder: Path,
        *,
        config: Mapping[str, Any],
        tokenizer: SavesItself,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Writes a Hugging Face folder, which is there whole or not at all.

        Each weight is stored in the dtype that it has in ``checkpoint_dir``, so that a bf16 model stays one whatever it
        was trained in, and in fp32 where there was no folder. A tied head is not stored.

        Args:
            state_dict: the decoder's, whole, on the CPU.
            folder: where; replaced if it exists.
            config: this checkpointer's ``config``, or ``llama_config`` of a decoder that came from no folder.
            tokenizer: writes its own files into a folder.
            max_shard_size: of one weights file, in bytes or as "5GB".

        Raises:
            NoSpaceLeft: the disk is full; nothing is left behind.
        """
        plan: StateDict = {}  # shapes and dtypes only: the weights themselves are converted one shard at a time
        sources: dict[str, str] = {}
        for key, weight in state_dict.items():
            name = _huggingface_name(config, key)
            plan[name] = torch.empty(weight.shape, dtype=self._dtypes.get(name, torch.float32), device="meta")
            sources[name] = key
        split = split_torch_state_dict_into_shards(plan, max_shard_size=max_shard_size)
        with written_whole(folder) as partial:
            _write_json(partial / "config.json", config)
            for file, names in split.filename_to_tensors.items():
                weights = {sources[name]: state_dict[sources[name]] for name in names}
                shard = _convert(config, to="huggingface", weights=weights)
                shard = {name: weight.to(plan[name].dtype).contiguous() for name, weight in shard.items()}
                save_file(shard, partial / file, metadata={"format": "pt"})
                shutil.copymode(partial / "config.json", partial / file)  # safetensors writes for the owner's eyes only
            if split.is_sharded:
                _write_json(partial / _INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
            if self._generation_config is not None:
                (partial / "generation_config.json").write_text(self._generation_config, encoding="utf-8")
            tokenizer.save(partial)


def _family(config: Mapping[str, Any], *, where: str) -> Family:
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: model_type '{model_type}' is not supported{nearest(model_type, FAMILIES)}")
    return FAMILIES[model_type]


def _convert(config: Mapping[str, Any], *, to: str, weights: Mapping[str, Tensor]) -> StateDict:
    family = _family(config, where="config")
    shape = family.architecture.from_config(config, where="config")
    convert = family.to_torchtune if to == "torchtune" else family.to_huggingface
    return convert(
        weights,
        num_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_key_value_heads,
        dim=shape.hidden_size,
        head_dim=shape.head_dim,
    )


def _huggingface_name(config: Mapping[str, Any], key: str) -> str:
    """Hugging Face's name of a weight; torchtune's where it has none."""
    names = {ours: theirs for theirs, ours in _family(config, where="config").names.items()}
    try:
        return convert_weights.get_mapped_key(key, names)
    except Exception:  # torchtune raises nothing more particular
        return key


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, all there. A single file goes before an index, as in transformers."""
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.exists():
        reason = f"there is neither {_SINGLE} nor {_INDEX} in {folder}"
        if any(folder.glob("pytorch_model*.bin*")):
            reason += "; its pytorch_model.bin is the old format, which is not read: save it anew with transformers"
        raise ValueError(f"{_KEY}: {reason}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{_KEY}: {index} is not the index of a sharded model ({reason})") from None
    for file in files:
        if not file.is_file():
            raise ValueError(f"{_KEY}: {index} names {file.name}, and there is no such file in {folder}")
    return files


def _read_dtypes(file: Path) -> dict[str, torch.dtype]:
    """The dtype of every weight in a file, from its header."""
    try:
        with safe_open(file, framework="pt") as weights:
            spelled = {key: weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{_KEY}: {file} cannot be read as safetensors: {error}") from None
    for key, dtype in spelled.items():
        if dtype not in _DTYPES:
            raise ValueError(
                f"{_KEY}: {file}: {key} is stored as {dtype}, which cannot be trained; allowed: {', '.join(_DTYPES)}"
            )
    return {key: _DTYPES[dtype] for key, dtype in spelled.items()}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
