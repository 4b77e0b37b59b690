"""The saved model ends its answers where it was trained to, with nothing but the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Runner
from standins import CHATML, write_tokenizer
from torchtune.models.llama3_2 import llama3_2
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adapt_recipes import models
from adapt_recipes.data import ByteTokenizer
from adapt_recipes.models import TokenLosses


def settings(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model, which has no chat template and ends its texts with another token than a chat."""
    folder = tmp_path / "base"
    vocab_size = write_tokenizer(folder, eos_token="</s>", chat_template=None)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    eos_id = AutoTokenizer.from_pretrained(folder).eos_token_id
    config = LlamaConfig(vocab_size=vocab_size, bos_token_id=None, eos_token_id=eos_id, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_base_model_with_a_template_of_its_own(run: Runner, base: Path, tmp_path: Path) -> None:
    (tmp_path / "chatml.jinja").write_text(CHATML)
    (tmp_path / "tasks").mkdir()
    rows = [{"prompt": f"q{i}", "response": "yes"} for i in range(16)]
    (tmp_path / "tasks" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = {"_component_": "adapt_recipes.models.decoder_from_folder", "path": str(base), "max_seq_len": 32}
    done = run(
        "tiny_proportional",
        "~tasks.noise",
        "~tokenizer.supervise_end",
        "tasks=adapt_recipes.data.jsonl_tasks",
        f"tasks.path={tmp_path / 'tasks'}",
        "tasks.validation_examples=2",
        "tokenizer=adapt_recipes.data.ChatTokenizer",
        f"tokenizer.path={base}",
        f"tokenizer.chat_template={tmp_path / 'chatml.jinja'}",
        f"model={json.dumps(model)}",
        f"checkpointer.checkpoint_dir={base}",
        "max_seq_len=32",
        "budget.epochs=60",
        "batch_size=4",
        "optimizer.lr=0.01",
    )

    folder = done.folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, base_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    for name in ("config.json", "generation_config.json"):
        assert settings(base, name)["eos_token_id"] == base_end
        assert settings(folder, name) == settings(base, name) | {"eos_token_id": [end, base_end]}
    name = "tokenizer_config.json"
    assert settings(folder, name) == settings(base, name) | {"eos_token": "<|im_end|>"}
    assert (folder / "chat_template.jinja").read_text() == CHATML

    trained = AutoModelForCausalLM.from_pretrained(folder)
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = trained.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(answer) == row["response"] + "<|im_end|>"


@pytest.mark.parametrize("supervise_end", [True, False])
def test_a_model_from_random_weights(tmp_path: Path, supervise_end: bool) -> None:
    """No folder says where it stops, but the tokenizer does."""
    sizes: dict[str, Any] = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 16}
    decoder = llama3_2(vocab_size=257, intermediate_dim=48, **sizes)
    tokenizer = ByteTokenizer(supervise_end=supervise_end)
    models.save(TokenLosses(decoder), models.HuggingFaceCheckpointer(None), tmp_path / "model", tokenizer=tokenizer)
    assert settings(tmp_path / "model", "config.json")["eos_token_id"] == 256
    assert settings(tmp_path / "model", "tokenizer_config.json")["eos_token"] == "<|end|>"
    assert (tmp_path / "model" / "generation_config.json").exists() == supervise_end
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id == 256
