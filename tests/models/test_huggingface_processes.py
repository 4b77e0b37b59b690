"""Two processes read a Hugging Face folder, each its rows, and write one together: the bytes of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import group
import pytest
import torch
import torch.testing._internal.distributed.fake_pg  # noqa: F401 (registers the backend)
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2

from adapt_recipes.data import ByteTokenizer
from adapt_recipes.files import NoSpaceLeft
from adapt_recipes.models import HuggingFaceCheckpointer, TokenLosses, gemma3, huggingface_config, train_adapters_alone
from adapt_recipes.models import huggingface as module
from adapt_recipes.training.process_group import all_gather_object, process_group, rank, world_size
from adapt_recipes.training.sharding import load_weights, on_meta, shard, to_local

CPU = torch.device("cpu")
# Two processes cannot share 65, 49 or 3 rows equally, and a gemma's only head of keys lies across both.
SIZES: dict[str, Any] = {"vocab_size": 65, "num_layers": 2, "num_heads": 4, "embed_dim": 32, "max_seq_len": 32}
LLAMA = SIZES | {"num_kv_heads": 2, "intermediate_dim": 49, "scale_factor": 1}
LORA: dict[str, Any] = {"lora_attn_modules": ["q_proj", "k_proj", "output_proj"], "lora_rank": 3, "lora_alpha": 8.0}
GEMMA = SIZES | {"num_kv_heads": 1, "head_dim": 8, "intermediate_dim": 49}
WINDOW = {"sliding_window": 8, "sliding_window_pattern": 2}

MODELS: dict[str, Any] = {
    "llama": lambda: llama3_2(**LLAMA, tie_word_embeddings=False),
    "llama with adapters": lambda: lora_llama3_2(**LLAMA, **LORA, apply_lora_to_mlp=True),
    "gemma": lambda: gemma3(**GEMMA, **WINDOW),
}
BASES = MODELS | {"llama with adapters": lambda: llama3_2(**LLAMA)}


def write_base(model: str, folder: Path) -> None:
    """A folder of several files in half precision, of random weights."""
    torch.manual_seed(5)
    decoder = BASES[model]()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    config = huggingface_config(decoder)
    HuggingFaceCheckpointer(None).save(
        decoder.state_dict(), folder, config=config, tokenizer=ByteTokenizer(), max_shard_size=20_000
    )
    for file in folder.glob("*.safetensors"):
        save_file({name: weight.bfloat16() for name, weight in load_file(file).items()}, file, {"format": "pt"})


def there_and_back(model: str, base: Path, out: Path) -> dict[str, Any]:
    """As a recipe does: built without weights, loaded, trained (each row alike, for a test), and saved."""
    checkpointer = HuggingFaceCheckpointer(str(base))
    with on_meta():
        decoder = MODELS[model]()
    adapters = train_adapters_alone(decoder)
    checkpointer.check(decoder)
    shard(TokenLosses(decoder), decoder.layers, device=CPU)
    weights = checkpointer.load()
    assert weights is not None
    load_weights(decoder, weights, seed=0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            assert isinstance(parameter, DTensor) == (world_size() > 1)
            if parameter.requires_grad:
                to_local(parameter).add_(0.1).mul_(1.1)
    arguments: dict[str, Any] = {
        "config": checkpointer.config,
        "tokenizer": ByteTokenizer(),
        "adapters": adapters,
        "max_shard_size": 9000,
    }
    checkpointer.save(decoder.state_dict(), out, **arguments)
    return {"checkpointer": checkpointer, "state_dict": decoder.state_dict(), **arguments}


def write_together(folder: Path) -> None:
    with process_group("cpu", batch_size=2):
        for model in MODELS:
            there_and_back(model, folder.parent / "bases" / model, folder / model / "model")


def the_disk_is_full(folder: Path) -> None:
    """In the middle of the second file."""
    with process_group("cpu", batch_size=2):
        first = there_and_back("llama", folder.parent / "bases" / "llama", folder / "first")
        checkpointer, state_dict = first.pop("checkpointer"), first.pop("state_dict")
        write, files = module._write_weights, []

        def full(file: Path, *arguments: Any, **named: Any) -> None:
            files.append(file)
            if len(files) == 2:
                raise OSError(28, "No space left on device")
            write(file, *arguments, **named)

        module._write_weights = full  # type: ignore[assignment]
        try:
            checkpointer.save(state_dict, folder / "second", **first)
        except Exception as error:
            assert isinstance(error, NoSpaceLeft if rank() == 0 else ValueError)
            (folder / f"failed on {rank()}").touch()
            assert all_gather_object(rank()) == [0, 1], "nobody is behind"
            raise


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("group")
    for model in MODELS:
        write_base(model, home / "bases" / model)
    return home


@pytest.fixture(scope="module")
def ended(home: Path) -> dict[str, list[group.Ended]]:
    return group.run((write_together, the_disk_is_full), home)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_write_the_bytes_of_one(
    ended: dict[str, list[group.Ended]], home: Path, tmp_path: Path, model: str
) -> None:
    assert [each.status for each in ended["write_together"]] == [0, 0], ended["write_together"][0].err
    there_and_back(model, home / "bases" / model, tmp_path / "model")
    alone, together = files(tmp_path), files(home / "write_together" / model)
    assert alone.keys() == together.keys()
    assert all(alone[name] == together[name] for name in alone)
    assert len([name for name in alone if name.startswith("model/model-")]) > 2, "several files"
    assert ("adapter/adapter_model.safetensors" in alone) == ("adapters" in model)


@pytest.fixture
def second_of_two() -> Iterator[None]:
    """This process is one of a group in which the other is not there."""
    torch.distributed.init_process_group("fake", store=torch.distributed.HashStore(), rank=1, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("model", MODELS)
def test_each_process_reads_its_rows(home: Path, model: str) -> None:
    checkpointer = HuggingFaceCheckpointer(str(home / "bases" / model))
    with on_meta():
        decoder = MODELS[model]()
    shard(TokenLosses(decoder), decoder.layers, device=CPU)
    weights = checkpointer.load()
    assert weights is not None
    load_weights(decoder, weights, seed=0)
    parameters = decoder.state_dict()
    for key, weight in weights.items():
        assert torch.equal(to_local(parameters[key]), weight[(len(weight) + 1) // 2 :].float()), key
    for key in parameters.keys() - weights.keys():
        assert to_local(parameters[key]).any() == ("lora_a" in key), "an adapter starts at 0"


def test_what_one_process_writes_is_what_it_has(home: Path, tmp_path: Path) -> None:
    """The reference above, without the code that it shares with the other."""
    there_and_back("gemma", home / "bases" / "gemma", tmp_path / "model")
    before = {k: v for file in (home / "bases" / "gemma").glob("*.safetensors") for k, v in load_file(file).items()}
    after = {k: v for file in (tmp_path / "model").glob("*.safetensors") for k, v in load_file(file).items()}
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(after[name], ((weight.float() + 0.1) * 1.1).bfloat16())


@pytest.mark.slow
def test_a_full_disk_of_the_first_process_ends_all(ended: dict[str, list[group.Ended]], home: Path) -> None:
    first, second = ended["the_disk_is_full"]
    assert (first.status, second.status) == (2, 2)
    folder = home / "the_disk_is_full"
    assert first.err.splitlines()[-1] == f"error: no space left while writing {folder / 'second'}"
    assert second.err == ""
    assert {path.name for path in folder.iterdir() if path.suffix == ""} == {"first", "failed on 0", "failed on 1"}
