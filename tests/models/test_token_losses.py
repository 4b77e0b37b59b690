"""The losses are those of the whole decoder's logits at the supervised positions, whatever is done to the decoder."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import CASES, LENGTH, make_pair, pair
from parity import tokens as parity_tokens
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from adapt_recipes.data.examples import IGNORE_INDEX
from adapt_recipes.models import TokenLosses, check_decoder

VOCAB = 61


def tiny_decoder(*, tied: bool = True) -> TransformerDecoder:
    torch.manual_seed(0)
    decoder = llama3_2(
        vocab_size=VOCAB,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=32,
        intermediate_dim=48,
        tie_word_embeddings=tied,
    )
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return decoder


def batch(*, share_supervised: float = 0.3, rows: int = 3, length: int = 17, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, length), generator=generator)
    labels = torch.randint(VOCAB, (rows, length), generator=generator)
    ignored = torch.rand(labels.shape, generator=generator) >= share_supervised
    return tokens, labels.masked_fill(ignored, IGNORE_INDEX)


def reference(decoder: TransformerDecoder, tokens: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(decoder(tokens).flatten(0, 1), labels.flatten(), reduction="none")
    return losses[labels.flatten() != IGNORE_INDEX]


def checkpointed(decoder: TransformerDecoder) -> None:
    set_activation_checkpointing(decoder, auto_wrap_policy={TransformerSelfAttentionLayer})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("treatment", [lambda decoder: None, checkpointed], ids=["plain", "checkpointed"])
def test_losses_and_gradients_equal_those_of_all_logits(
    tied: bool, treatment: Callable[[TransformerDecoder], None]
) -> None:
    """Of a compiled decoder too: see test_builders.py."""
    decoder = tiny_decoder(tied=tied)
    expected_decoder = copy.deepcopy(decoder)
    if tied:  # deepcopy does not follow the tie, which is no module
        expected_decoder.output.tied_module = expected_decoder.tok_embeddings
    tokens, labels = batch()
    expected = reference(expected_decoder, tokens, labels)
    expected.mean().backward()

    treatment(decoder)
    losses = TokenLosses(decoder)(tokens, labels)
    losses.mean().backward()

    assert losses.dtype == torch.float32 and losses.shape == (int((labels != IGNORE_INDEX).sum()),)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(decoder.parameters(), expected_decoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_everything_supervised() -> None:
    decoder = tiny_decoder()
    tokens, labels = batch(share_supervised=1.0)
    torch.testing.assert_close(TokenLosses(decoder)(tokens, labels), reference(decoder, tokens, labels))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_nothing_supervised_gives_zero_gradients(compute_dtype: torch.dtype | None) -> None:
    model = TokenLosses(tiny_decoder(), compute_dtype=compute_dtype)
    tokens, labels = batch(share_supervised=0.0)
    losses = model(tokens, labels)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@torch.no_grad()
def test_of_equal_logits_the_first_is_the_arg_max() -> None:
    model, (tokens, labels) = TokenLosses(tiny_decoder(tied=False)), batch(share_supervised=1.0)
    torch.nn.init.zeros_(model.decoder.output.weight)
    labels[:, ::2] = 0
    assert torch.equal(model(tokens, labels, "scores")[:, 1], (labels.flatten() == 0).float())


@torch.no_grad()
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("share_supervised", [0.6, 0.0])
def test_scores_in_chunks_are_those_of_the_whole(compute_dtype: torch.dtype | None, share_supervised: float) -> None:
    tokens, labels = batch(share_supervised=share_supervised)
    whole = TokenLosses(tiny_decoder(), compute_dtype=compute_dtype)
    supervised = labels != IGNORE_INDEX
    labels[supervised] = whole(tokens, labels, "logits").argmax(-1)
    labels[0] = labels[0].where(~supervised[0], 5)
    expected = whole(tokens, labels, "scores")
    assert expected.shape == (int(supervised.sum()), 2)
    assert not share_supervised or 0 < expected[:, 1].mean() < 1
    for chunk in (1, 5, 1000):
        chunked = TokenLosses(tiny_decoder(), compute_dtype=compute_dtype, loss_chunk_tokens=chunk)
        scores = chunked(tokens, labels, "scores")
        torch.testing.assert_close(scores[:, 0], expected[:, 0], rtol=1e-5, atol=1e-5)
        assert torch.equal(scores[:, 1], expected[:, 1])


def test_a_padded_row_has_the_losses_that_it_has_alone() -> None:
    model = TokenLosses(tiny_decoder())
    tokens, labels = batch(share_supervised=0.5)
    lengths = [17, 5, 9]
    for row, length in enumerate(lengths):
        tokens[row, length:] = 0
        labels[row, length:] = IGNORE_INDEX
    alone = [model(tokens[row : row + 1, :n], labels[row : row + 1, :n]) for row, n in enumerate(lengths)]
    torch.testing.assert_close(model(tokens, labels), torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32 weights", "bf16 weights"])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=["as the weights are", "bf16 compute"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_losses_are_made_of_logits_and_logits_of_hidden_states(
    tied: bool, compute_dtype: torch.dtype | None, weights: torch.dtype
) -> None:
    decoder = tiny_decoder(tied=tied).to(weights)
    model, (tokens, labels) = TokenLosses(decoder, compute_dtype=compute_dtype), batch()
    supervised = labels != IGNORE_INDEX
    logits, hidden = model(tokens, labels, "logits"), model(tokens, labels, "hidden_states")
    assert logits.dtype == torch.float32 and logits.shape == (int(supervised.sum()), VOCAB)
    assert hidden.shape == (*tokens.shape, 32)
    losses = F.cross_entropy(logits, labels[supervised], reduction="none")
    assert torch.equal(losses, model(tokens, labels)) and torch.equal(losses, model(tokens, labels, "losses"))
    # Some labels are the likeliest tokens, some are not.
    likeliest = labels.masked_scatter(supervised, logits.argmax(-1)).where(torch.arange(3)[:, None] == 1, labels)
    scores, is_second = model(tokens, likeliest, "scores"), supervised.nonzero()[:, 0] == 1
    assert scores.dtype == torch.float32 and torch.equal(scores[:, 0], model(tokens, likeliest))
    assert scores[is_second, 1].all() and scores[:, 1].sum() < len(scores)
    assert torch.equal(scores[:, 1], (logits.argmax(-1) == likeliest[supervised]).float())
    # Hidden states are of whole rows, and logits of rows up to their last label: kernels of bf16 round otherwise.
    in_bf16 = torch.bfloat16 in (weights, compute_dtype)
    tolerance = {"rtol": 0.02, "atol": 0.1} if in_bf16 else {"rtol": 1e-5, "atol": 1e-5}
    with model.autocast():
        torch.testing.assert_close(decoder.output(hidden[supervised]).float(), logits, **tolerance)
        expected = decoder(tokens)
    torch.testing.assert_close(logits, expected[supervised].float(), **tolerance)
    exact = TokenLosses(tiny_decoder(tied=tied))(tokens, labels, "hidden_states")
    if weights == torch.float32 and compute_dtype is None:
        assert torch.equal(hidden, exact)
    else:
        assert 1e-4 < (hidden.float() - exact).abs().max() < 0.1 * exact.abs().max(), "computed in bf16"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("beginning", [0, 3, 12])
def test_rows_that_begin_alike_have_the_losses_and_gradients_that_they_have_alone(name: str, beginning: int) -> None:
    """Of all families, with sliding windows shorter than the rows, repeated rows, and rows that others contain."""
    decoder = make_pair(name)[0].double()
    model = TokenLosses(decoder)
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(1, 40, (2, 6, LENGTH), generator=generator)
    tokens[:, :beginning] = tokens[0, :beginning]
    tokens[3], tokens[5] = tokens[2], tokens[4]
    lengths = [LENGTH, LENGTH - 2, LENGTH, LENGTH, LENGTH, LENGTH - 5]
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORE_INDEX
    labels[:, ::3] = IGNORE_INDEX

    def losses_and_gradients(rows: list[slice]) -> tuple[Tensor, list[Tensor]]:
        decoder.zero_grad()
        losses = torch.cat([model(tokens[row], labels[row]) for row in rows])
        (losses * torch.linspace(-1, 2, len(losses), dtype=torch.float64)).sum().backward()
        return losses, [p.grad for p in decoder.parameters() if p.grad is not None]

    together, gradients = losses_and_gradients([slice(None)])
    alone, gradients_alone = losses_and_gradients([slice(i, i + 1) for i in range(6)])
    # Norms, rotations and the cross-entropy are computed in fp32.
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients, gradients_alone, rtol=1e-4, atol=2e-5)


def test_a_shared_beginning_and_padding_are_not_computed_again() -> None:
    model, (tokens, labels) = TokenLosses(tiny_decoder()), batch(share_supervised=1.0)
    tokens[:, :8] = tokens[0, :8]
    labels[2, 12:] = IGNORE_INDEX
    seen: list[int] = []
    model.decoder.tok_embeddings.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    model(tokens, labels)
    assert seen == [17 + 9 + 4]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_hidden_states_are_those_of_transformers(name: str) -> None:
    """Of the top layer, behind the final norm; padding after a row changes none of it, nor of the loss of the rest."""
    decoder, model = pair(name)
    rows = parity_tokens()
    expected = model(rows, output_hidden_states=True).hidden_states[-1]
    labels = torch.full_like(rows, IGNORE_INDEX)  # what is supervised does not matter
    hidden = TokenLosses(decoder)(rows, labels, "hidden_states")
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.5
    padded = rows.clone()
    padded[:, LENGTH - 9 :] = 0
    shorter = TokenLosses(decoder)(padded, labels, "hidden_states")[:, : LENGTH - 9]
    torch.testing.assert_close(shorter, expected[:, : LENGTH - 9], rtol=0, atol=1e-5)


@pytest.mark.parametrize("treatment", [lambda decoder: None, checkpointed])
def test_casting_the_weights_once_for_several_forwards_changes_no_bit(treatment: Callable[..., None]) -> None:
    def gradients(around: bool) -> tuple[list[Tensor], int]:
        decoder, num_casts = tiny_decoder(), 0
        treatment(decoder)
        model = TokenLosses(decoder, compute_dtype=torch.bfloat16)

        class CountCasts(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal num_casts
                num_casts += func is torch.ops.aten._to_copy.default and args[0] is decoder.layers[0].mlp.w1.weight
                return func(*args, **(kwargs or {}))

        with CountCasts(), model.autocast() if around else contextlib.nullcontext():
            for seed in (0, 1):
                model(*batch(seed=seed)).sum().backward()
        return [parameter.grad for parameter in decoder.parameters() if parameter.grad is not None], num_casts

    (once, one_cast), (each, casts) = gradients(True), gradients(False)
    assert one_cast == 1 < casts
    assert all(torch.equal(a, b) for a, b in zip(once, each, strict=True))


@pytest.mark.parametrize("share_supervised", [0.3, 0.0])
def test_as_the_root_of_fsdp2(share_supervised: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tied head reads the embeddings in the root's forward, where they are whole."""
    tokens, labels = batch(share_supervised=share_supervised)
    plain = TokenLosses(tiny_decoder())
    expected = plain(tokens, labels)
    expected.sum().backward()
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sharded = TokenLosses(tiny_decoder())
        mesh = init_device_mesh("cpu", (1,))
        for layer in sharded.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for output in ("scores", "logits", "hidden_states"):
            assert torch.equal(sharded(tokens, labels, output), plain(tokens, labels, output))
        losses = sharded(tokens, labels)
        losses.sum().backward()
        assert torch.equal(losses, expected)
        for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad.full_tensor(), theirs.grad)  # type: ignore[union-attr, arg-type]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("max_seq_len", "max_token", "said"),
    [
        (65, 5, r"model\.max_seq_len: 64 is less than max_seq_len, 65"),
        (64, 64, r"model\.vocab_size: 64 is too small: .* 64"),
    ],
)
def test_a_decoder_that_cannot_read_the_data_is_refused(max_seq_len: int, max_token: int, said: str) -> None:
    decoder = llama3_2(vocab_size=64, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=8, max_seq_len=64)
    check_decoder(decoder, max_seq_len=64, max_token=63)
    with pytest.raises(ValueError, match=said):
        check_decoder(decoder, max_seq_len=max_seq_len, max_token=max_token)
    with pytest.raises(ValueError, match=r"model\._component_: returns a Linear"):
        check_decoder(torch.nn.Linear(2, 2), max_seq_len=1, max_token=1)
