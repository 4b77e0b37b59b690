"""Both recipes train adapters alone where the model has some: base, probes, resume and the folders at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Runner
from running import CONFIGS, Runs, assert_same_run, files, load_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from torchtune.models.llama3_2 import llama3_2
from transformers import AutoModelForCausalLM

from adapt_recipes.data import ByteTokenizer, toy_tasks
from adapt_recipes.data.conversations import checked_conversation
from adapt_recipes.models import HuggingFaceCheckpointer, huggingface_config

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 16,
    "scale_factor": 1,
}
LORA: dict[str, Any] = {
    "_component_": "torchtune.models.llama3_2.lora_llama3_2",
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    torch.manual_seed(0)
    decoder = llama3_2(**SIZES)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    HuggingFaceCheckpointer(None).save(
        decoder.state_dict(), folder, config=huggingface_config(decoder), tokenizer=ByteTokenizer()
    )
    return folder


def lora_on(base: Path, **changes: Any) -> list[str]:
    return [f"model={json.dumps(LORA | SIZES | changes)}", f"checkpointer.checkpoint_dir={base}"]


def decoder_from(base: Path) -> list[str]:
    """``lora_on``, with the sizes of the folder."""
    decoder = {"_component_": "adapt_recipes.models.decoder_from_folder", "path": str(base), "max_seq_len": 16}
    adapters = {key: value for key, value in LORA.items() if key != "_component_"}
    model = {"_component_": "adapt_recipes.models.with_lora", "decoder": decoder, **adapters}
    return [f"model={json.dumps(model)}", f"checkpointer.checkpoint_dir={base}"]


def merged(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The base's weights, and to each that has an adapter alpha / r B A."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights, deltas = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in {name.split(".lora_")[0] for name in deltas}:
        b, a = deltas[f"{name}.lora_B.weight"], deltas[f"{name}.lora_A.weight"]
        weights[f"{name.removeprefix('base_model.model.')}.weight"] += config["lora_alpha"] / config["r"] * b @ a
    return weights


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        pytest.param("tiny_uniform", [], marks=pytest.mark.slow),
        pytest.param("tiny_adapt", ["probe.estimator=finite_difference"], marks=pytest.mark.slow),
        ("tiny_adapt", ["probe.estimator=backward", "probe.exact_lookahead=true", "dtype=bf16"]),
        pytest.param(
            "tiny_adapt_planned",
            ["activation_checkpointing=true", "clip_grad_norm=1.0", "device=cpu"],
            marks=pytest.mark.slow,
        ),
        pytest.param("tiny_mos_diff", [], marks=pytest.mark.slow),
        pytest.param("tiny_multidds", ["dtype=bf16", "sampling=dataset"], marks=pytest.mark.slow),
        pytest.param("tiny_multiuat", ["reward.mc_samples=2"], marks=pytest.mark.slow),  # LoRA's own dropout
    ],
)
def test_a_run(run: Runner, base: Path, config: str, overrides: list[str]) -> None:
    model = decoder_from(base) if config == "tiny_adapt" else lora_on(base)
    done = run(config, *model, *overrides, "budget.tokens=320", "optimizer.lr=0.03")
    assert done.summary["supervised_tokens"] == 320
    assert done.summary["mean_validation_loss"] < sum(done.summary["initial_validation_losses"].values()) / 7 - 0.1
    if config == "tiny_adapt":
        assert done.summary["mixture_updates"] > 2
        assert all(any(line["gradient_dots"].values()) for line in done.events("mixture")[1:])
    if "reward" in CONFIGS[config].read_text():
        assert all(any(line["rewards"].values()) for line in done.events("mixture")[1:])

    assert sorted(path.name for path in done.folder.iterdir()) == [
        "adapter",
        "checkpoints",
        "log.jsonl",
        "model",
        "resolved.yaml",
        "summary.json",
    ]
    assert files(done.folder / "adapter").keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert not [name for name in files(done.folder / "model") if "adapter" in name]
    expected = merged(base, done.folder / "adapter")
    model = load_file(done.folder / "model" / "model.safetensors")
    assert model.keys() == expected.keys()
    for name, weight in model.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
        frozen = "_proj" not in name
        assert torch.equal(weight, load_file(base / "model.safetensors")[name]) == frozen, name
    (state,) = [load_checkpoint(path) for path in (done.folder / "checkpoints").iterdir()]
    assert len(state["optimizer"]) == 2 * 2 * 7, "A and B of seven projections in two layers"

    served = AutoModelForCausalLM.from_pretrained(done.folder / "model").eval()
    for task in toy_tasks():
        assert task.validation is not None
        tokens = torch.tensor(
            [ByteTokenizer(supervise_end=False).encode(checked_conversation(row))[0] for row in task.validation]
        )
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(served(tokens[:, :-1]).logits[:, -1], tokens[:, -1])
        tolerance = 0.02 if "dtype=bf16" in overrides else 1e-5
        assert float(loss) == pytest.approx(done.summary["validation_losses"][task.name], abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["adapt", "mos_diff", "uniform"])
def test_a_run_that_is_resumed_is_the_run_that_was_never_stopped(tmp_path: Path, base: Path, strategy: str) -> None:
    runs = Runs(tmp_path)
    changes = {"model": json.dumps(LORA | SIZES), "checkpointer.checkpoint_dir": base, "budget.tokens": 200}
    del runs.settings["model.attn_dropout"]
    assert runs.run(strategy, expected := tmp_path / "expected", **changes) == 0
    for after in (1, 5):
        runs.stop(strategy, tmp_path / "run", after=after, **changes)
    assert runs.run(strategy, tmp_path / "run", **changes) == 0
    assert_same_run(tmp_path / "run", expected)
    assert files(tmp_path / "run" / "adapter") == files(expected / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "model: its adapters are DoRALinear, which is not supported; allowed: LoRALinear"),
        (
            {"embed_dim": 64},
            "does not fit the model: model.embed_tokens.weight is (257, 32) in the folder and (257, 64) in the model",
        ),
        ({"scale_factor": 32}, "does not fit the model: rope_scaling is None in its config.json and Llama3Scaling("),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_at_the_start(
    run: Runner, tmp_path: Path, base: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        run("tiny_adapt", *lora_on(base, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
