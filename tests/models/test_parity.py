"""The six models compute what transformers computes, and go on doing so whatever training does to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import CASES, LENGTH, VOCAB, WINDOW, build, pair, tokens, translated
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtune.models.gemma import gemma_2b
from torchtune.models.llama3 import llama3_8b
from torchtune.models.llama3_2 import llama3_2_1b
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.attention_utils import create_block_causal_mask
from torchtune.training import compile_model, load_from_full_model_state_dict, set_activation_checkpointing

from adapt_recipes.data.examples import IGNORE_INDEX
from adapt_recipes.models import TokenLosses, gemma3_1b, qwen1_5_0_5b, qwen3_0_6b

OURS = ["gemma3", "qwen3", "qwen1_5"]  # what this project builds, not torchtune


def supervised(rows: Tensor) -> Tensor:
    """Labels: what follows, at a third of the positions."""
    labels = rows.roll(-1, dims=1)
    ignored = torch.rand(rows.shape, generator=torch.Generator().manual_seed(2)) > 1 / 3
    ignored[:, -1] = True
    return labels.masked_fill(ignored, IGNORE_INDEX)


def gradients(decoder: TransformerDecoder, compute_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    rows = tokens()
    TokenLosses(decoder, compute_dtype=compute_dtype)(rows, supervised(rows)).mean().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    return {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}


# ---- the same function as in transformers


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tmp_path: Path) -> None:
    decoder, model = pair(name, tmp_path)
    for length in (1, WINDOW, WINDOW + 1, LENGTH):
        expected = model(tokens(length)).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(decoder(tokens(length)), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_two_documents_in_a_row_are_as_each_alone(name: str, tmp_path: Path) -> None:
    decoder, model = pair(name, tmp_path)
    lengths = torch.tensor([LENGTH - 2 * WINDOW - 1, 2 * WINDOW + 1])  # both longer than the window
    documents = [tokens(int(length), rows=1, seed=index) for index, length in enumerate(lengths)]
    packed = decoder(
        torch.cat(documents, dim=1),
        mask=create_block_causal_mask([lengths]),
        input_pos=torch.cat([torch.arange(int(length)) for length in lengths])[None],
    )
    expected = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_logits_in_bf16(name: str, tmp_path: Path) -> None:
    """Gemma 3 to the bit. The others round once less than transformers, where it rounds before a norm's weights."""
    decoder, model = pair(name, tmp_path, torch.bfloat16)
    assert {weight.dtype for weight in decoder.state_dict().values()} == {torch.bfloat16}
    ours, theirs = decoder(tokens()), model(tokens()).logits.float()
    if name == "gemma3":
        assert torch.equal(ours, theirs)
    exact = build(name)
    exact.load_state_dict(decoder.state_dict())
    errors = [(logits - exact(tokens())).square().mean().sqrt() for logits in (ours, theirs)]
    assert 0 < errors[0] < 1.2 * errors[1] < 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.2)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, tmp_path: Path) -> None:
    """Of the losses at supervised positions only; transformers' become the weights of a folder, to get our names."""
    decoder, model = pair(name, tmp_path / "weights")
    ours = gradients(decoder)
    rows = tokens()
    logits = model(rows).logits
    F.cross_entropy(logits.flatten(0, 1), supervised(rows).flatten(), ignore_index=IGNORE_INDEX).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    theirs = translated(model, tmp_path / "gradients")
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        assert (gradient - theirs[key]).norm() < 1e-4 * theirs[key].norm(), key


def test_scaled_rotations_matter_here() -> None:
    """Else the parity of Llama 3.2 would say little."""
    scaled, plain = build("llama3_2"), build("llama3_2", scale_factor=1)
    assert (scaled(tokens()) - plain(tokens())).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("builder", "parameters", "max_seq_len"),
    [
        (lambda: gemma3_1b(max_seq_len=64), 999_885_952, 64),
        (lambda: qwen3_0_6b(max_seq_len=64), 596_049_920, 64),
        (lambda: qwen1_5_0_5b(max_seq_len=64), 463_987_712, 64),
        (llama3_2_1b, 1_235_814_400, 131_072),
        (llama3_8b, 8_030_261_248, 8192),
        (gemma_2b, 2_506_172_416, 8192),
    ],
    ids=["gemma3_1b", "qwen3_0_6b", "qwen1_5_0_5b", "llama3_2_1b", "llama3_8b", "gemma_2b"],
)
def test_sizes(builder: Callable[[], TransformerDecoder], parameters: int, max_seq_len: int) -> None:
    with torch.device("meta"):
        decoder = builder()
    assert sum(parameter.numel() for parameter in decoder.parameters()) == parameters
    assert decoder.max_seq_len == max_seq_len


# ---- what training does to a decoder


@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_a_token_changes_nothing_before_it(name: str) -> None:
    """Nor, therefore, does the padding behind a row."""
    decoder, rows = build(name), tokens()
    changed = rows.clone()
    changed[:, LENGTH // 2 :] = (changed[:, LENGTH // 2 :] + 1) % VOCAB
    logits, others = decoder(rows), decoder(changed)
    assert torch.equal(logits[:, : LENGTH // 2], others[:, : LENGTH // 2])
    assert (logits[:, LENGTH // 2 :] != others[:, LENGTH // 2 :]).any(dim=-1).all()


def test_right_padded_rows_have_the_logits_that_they_have_alone() -> None:
    decoder, row = build("gemma3"), tokens(WINDOW, rows=1)  # alone it needs no window
    padded = torch.cat([row, row.new_zeros(1, LENGTH - WINDOW)], dim=1)
    torch.testing.assert_close(decoder(padded)[:, :WINDOW], decoder(row), rtol=0, atol=1e-5)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
def test_activation_checkpointing(name: str, compute_dtype: torch.dtype | None) -> None:
    expected = gradients(build(name), compute_dtype)
    decoder = build(name)
    set_activation_checkpointing(decoder, auto_wrap_policy={TransformerSelfAttentionLayer})
    for key, gradient in gradients(decoder, compute_dtype).items():
        assert torch.equal(gradient, expected[key.replace("_checkpoint_wrapped_module.", "")]), key


def compiled_afresh(decoder: TransformerDecoder) -> None:
    torch._dynamo.reset()  # else layers of other tests count towards the limit, beyond which nothing is compiled
    counters.clear()
    compile_model(decoder, verbose=False)


@pytest.mark.parametrize("name", OURS)
def test_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")  # traces forward and backward; needs no C++ compiler
    changes: dict[str, Any] = {"num_layers": 2, "sliding_window_pattern": 2} if name == "gemma3" else {"num_layers": 2}
    expected = gradients(build(name, **changes))
    decoder = build(name, **changes)
    compiled_afresh(decoder)
    torch.testing.assert_close(gradients(decoder), expected, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == (2 if name == "gemma3" else 1), "one graph for each kind of layer"
    assert not counters["graph_break"]


@torch.no_grad()
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler (g++), which inductor needs on the CPU")
def test_compiled_to_machine_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One layer, forward only: a compilation takes its time."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    decoder = build("gemma3", num_layers=1)
    expected = decoder(tokens())
    compiled_afresh(decoder)
    torch.testing.assert_close(decoder(tokens()), expected, rtol=0, atol=1e-5)
    assert counters["inductor"] and counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("name", OURS)
def test_bf16_compute_keeps_the_residual_stream_and_the_gradients_in_fp32(name: str) -> None:
    decoder, rows = build(name), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = decoder.tok_embeddings(rows)
        for layer in decoder.layers:
            projected = layer.attn.q_proj(layer.sa_norm(hidden))
            hidden = layer(hidden)
            assert (projected.dtype, hidden.dtype) == (torch.bfloat16, torch.float32)
    exact = gradients(build(name))
    for key, gradient in gradients(decoder, torch.bfloat16).items():
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - exact[key]).norm() < 0.1 * exact[key].norm(), key


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
def test_built_on_the_meta_device(name: str, dtype: torch.dtype) -> None:
    expected = build(name, dtype)
    with torch.device("meta"):
        decoder = CASES[name].build(**CASES[name].sizes).to(dtype).eval()
    decoder.to_empty(device="cpu")
    for module in decoder.modules():
        for buffer in module.buffers(recurse=False):
            buffer.fill_(torch.nan)  # what is left there may be anything
        if hasattr(module, "rope_init"):
            module.rope_init()
    decoder.load_state_dict(expected.state_dict())
    assert torch.equal(decoder(tokens()), expected(tokens()))


@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_attention_dropout_acts_in_training_only(name: str) -> None:
    plain, dropping = build(name), build(name, attn_dropout=0.5)
    assert torch.equal(plain(tokens()), dropping(tokens()))
    assert torch.equal(plain.train()(tokens()), dropping(tokens()))
    dropping.train()
    assert not torch.equal(dropping(tokens()), dropping(tokens()))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", OURS)
def test_under_fsdp2_as_torchtune_sets_it_up(name: str) -> None:
    plain = build(name)
    expected = gradients(plain)
    with torch.device("meta"):
        decoder = CASES[name].build(**CASES[name].sizes)
    model = TokenLosses(decoder)
    set_activation_checkpointing(decoder, auto_wrap_policy={TransformerSelfAttentionLayer})
    mesh = init_device_mesh("cpu", (1,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in decoder.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()
    cpu = torch.device("cpu")
    load_from_full_model_state_dict(decoder, plain.state_dict(), cpu, strict=True)
    rows = tokens()
    model(rows, supervised(rows)).mean().backward()
    for key, parameter in decoder.named_parameters():
        assert parameter.grad is not None
        gradient: Any = parameter.grad
        assert torch.equal(gradient.full_tensor(), expected[key.replace("_checkpoint_wrapped_module.", "")]), key
