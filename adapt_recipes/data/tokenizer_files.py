"""Reads the files of a tokenizer as ``AutoTokenizer`` of transformers 5 does, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from adapt_recipes.files import check_not_lfs

# Split words as Qwen2's tokenizers do.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By the model_type in config.json, the class that transformers takes where no file names one.
_DEFAULT_CLASS = {
    None: "TokenizersBackend",
    "llama": "TokenizersBackend",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
# Classes that read tokenizer.json as it is.
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFiles(NamedTuple):
    """What a folder says about its tokenizer.

    Attributes:
        tokenizer: of the class that transformers would take, with every token that transformers would add.
        special_tokens: by their names in ``tokenizer_config.json``: ``eos_token``, ...
        special_ids: of these tokens, and of all others that are marked special.
        only_named: tokens that exist only because ``tokenizer_config.json`` names them.
        class_name: of transformers, without the ending ``Fast``.
        config: ``tokenizer_config.json``.
    """

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    special_ids: frozenset[int]
    only_named: frozenset[str]
    class_name: str
    config: dict[str, Any]


class _Rebuilt(NamedTuple):
    """What a class of transformers 5 takes instead of what tokenizer.json says: of that file it reads words and merges.

    Attributes:
        model: arguments of ``BPE``.
        special_tokens: what ``tokenizer_config.json`` names, if it does not say otherwise.
    """

    normalizer: normalizers.Normalizer | None
    pre_tokenizer: pre_tokenizers.PreTokenizer
    model: dict[str, Any]
    special_tokens: Mapping[str, str | None]


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Reads ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        ValueError: a file is missing or malformed, or transformers reads it with a class that is not known here.
    """
    file = _tokenizer_file(folder)
    config = read_json(folder / "tokenizer_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        # The tokenizers library raises nothing more specific.
        raise ValueError(f"{file}: {error}") from None
    name = _class_name(folder, config, file)
    rebuilt = None if name in _GENERIC else _REBUILT[name](config)

    # Tokens that the config names.
    named: dict[str, str | AddedToken | None] = dict.fromkeys(_ROLES)
    named |= {"pad_token": tokenizer.padding["pad_token"]} if tokenizer.padding else {}
    named |= rebuilt.special_tokens if rebuilt else {}
    has_decoder = "added_tokens_decoder" in config
    legacy = {} if has_decoder else read_json(folder / "special_tokens_map.json", optional=True)
    extra = _read_special_tokens(config, legacy, named)
    special = [token for token in (*named.values(), *extra) if token is not None]

    # Tokens that the files list.
    if has_decoder:
        listed = {int(index): _token(value) for index, value in config["added_tokens_decoder"].items()}
    else:
        listed = _legacy_added_tokens(folder, {*map(str, special)}) | tokenizer.get_added_tokens_decoder()

    # Add those that the tokenizer lacks.
    if rebuilt:
        tokenizer = _rebuild(tokenizer, file, name, rebuilt, listed)
    existing = tokenizer.get_added_tokens_decoder().values()
    present = {repr(token) for token in existing}
    added = [token for _, token in sorted(listed.items()) if repr(token) not in present]
    known = {token.content for token in (*existing, *added)}
    only_named = {str(token): token for token in special if str(token) not in known}
    added += [AddedToken(token, special=True) if isinstance(token, str) else token for token in only_named.values()]
    tokenizer.add_tokens(added)
    if name == "Qwen2Tokenizer":
        tokenizer.add_tokens([AddedToken(str(token), special=True) for token in special])

    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    ids = {index for token in special if (index := tokenizer.token_to_id(str(token))) is not None}
    ids |= {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    names = {key: str(token) for key, token in named.items() if token is not None}
    return TokenizerFiles(tokenizer, names, frozenset(ids), frozenset(only_named), name, config)


def _tokenizer_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; `tune download MODEL --output-dir FOLDER` creates one")
    file = folder / "tokenizer.json"
    for known in (file, folder / "tokenizer.model"):
        if known.is_file():
            check_not_lfs(known)
    if not file.is_file() and (folder / "tokenizer.model").is_file():
        command = f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
        raise ValueError(
            f"{folder} has only a SentencePiece model, no tokenizer.json; "
            f'`python -c "from transformers import AutoTokenizer; {command}"` writes it'
        )
    if not file.is_file():
        raise ValueError(f"no file {file}")
    return file


def _class_name(folder: Path, config: dict[str, Any], file: Path) -> str:
    """The class of transformers that reads the folder, without the ending ``Fast``."""
    model = read_json(folder / "config.json", optional=True)
    model_type = model.get("model_type")
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if name is None or model_type == "qwen2":
        # What the files of a Qwen 2 model name is not trusted by transformers.
        name = _DEFAULT_CLASS.get(model_type, "TokenizersBackend")
    name = name.removesuffix("Fast")
    if name == "LlamaTokenizer" and b'"ByteLevel"' in file.read_bytes():
        # As Llama 3's.
        name = "TokenizersBackend"
    if name not in _GENERIC and (name not in _REBUILT or model_type not in _DEFAULT_CLASS or "auto_map" in config):
        raise ValueError(
            f"{folder}: transformers may not read tokenizer.json as it is, because tokenizer_config.json names the "
            f"class {name}; supported: {', '.join(_REBUILT)}, or TokenizersBackend, which reads it as it is"
        )
    return name


def _llama(config: dict[str, Any]) -> _Rebuilt:
    add_prefix_space = config.get("add_prefix_space")
    where = "always" if config.get("legacy") else "first"
    where = where if add_prefix_space or add_prefix_space is None else "never"
    return _Rebuilt(
        normalizer=None,
        pre_tokenizer=pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=where, split=False),
        model={"fuse_unk": True, "byte_fallback": True},
        special_tokens={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    )


def _gemma(config: dict[str, Any]) -> _Rebuilt:
    unknown = str(_token(config.get("unk_token", "<unk>")))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return _Rebuilt(
        normalizer=normalizers.Replace(" ", "▁"),
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
        model={"fuse_unk": True, "byte_fallback": True, "unk_token": unknown},
        special_tokens=names | {"unk_token": "<unk>"},
    )


def _qwen2(config: dict[str, Any]) -> _Rebuilt:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")), use_regex=False)
    return _Rebuilt(
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated"), byte_level]),
        model={},
        special_tokens=dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    )


def _gpt2(config: dict[str, Any]) -> _Rebuilt:
    return _Rebuilt(
        normalizer=None,
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space"))),
        model={},
        special_tokens=dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>") | {"pad_token": None},
    )


_REBUILT = {"LlamaTokenizer": _llama, "GemmaTokenizer": _gemma, "Qwen2Tokenizer": _qwen2, "GPT2Tokenizer": _gpt2}


def _rebuild(
    tokenizer: Tokenizer, file: Path, name: str, rebuilt: _Rebuilt, listed: dict[int, AddedToken]
) -> Tokenizer:
    """The tokenizer with what the class takes; without its added tokens unless they are those that are listed."""
    if not isinstance(tokenizer.model, models.BPE):
        raise ValueError(f"{file}: transformers reads it as {name}, whose model is BPE, not another")
    affixes = tokenizer.model.continuing_subword_prefix or tokenizer.model.end_of_word_suffix
    if affixes or repr(sorted(listed.items())) != repr(sorted(tokenizer.get_added_tokens_decoder().items())):
        model = json.loads(file.read_bytes())["model"]
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        post_processor = tokenizer.post_processor
        tokenizer = Tokenizer(models.BPE(model["vocab"], merges))
        if post_processor:
            tokenizer.post_processor = post_processor
    # A BPE of the defaults, but for what the class says.
    default = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    for key, value in (default | rebuilt.model).items():
        setattr(tokenizer.model, key, value)
    tokenizer.normalizer = rebuilt.normalizer
    tokenizer.pre_tokenizer = rebuilt.pre_tokenizer
    return tokenizer


def _read_special_tokens(config: dict[str, Any], legacy: dict[str, Any], named: dict[str, Any]) -> list[Any]:
    """Adds to ``named`` what the config and the older ``special_tokens_map.json`` name; returns the unnamed ones."""
    for key, value in (config | legacy).items():
        if key in _ROLES or (key.endswith("_token") and isinstance(value, str | dict)):
            named[key] = _token(value)
    extra: list[Any] = []
    current = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    for more in (current, legacy.get("extra_special_tokens")):
        if isinstance(more, dict):
            named |= {key: _token(value) for key, value in more.items()}
        else:
            extra += more or []
    return [_token(value) for value in extra or legacy.get("additional_special_tokens", ())]


def _token(value: Any) -> Any:
    """A special token of a config, which may be an object."""
    if not isinstance(value, dict):
        return value
    try:
        return AddedToken(**{key: each for key, each in value.items() if key != "__type"})
    except TypeError:
        raise ValueError(f"tokenizer_config.json: {value} is not a token") from None


def _legacy_added_tokens(folder: Path, special: set[str]) -> dict[int, AddedToken]:
    indices = read_json(folder / "added_tokens.json", optional=True)
    return {
        index: AddedToken(content, normalized=content not in special, special=content in special)
        for content, index in indices.items()
    }


def read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file; an optional file that does not exist is an empty one."""
    if not file.is_file():
        if optional:
            return {}
        raise ValueError(f"no file {file}")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must be a JSON object")
    return content
