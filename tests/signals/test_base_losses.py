"""The base model's losses: those that the probe measures, read again as long as nothing that they depend on changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import alone, batched, tiny_examples, tiny_model

from adapt_recipes.data import IGNORE_INDEX, MicroBatch
from adapt_recipes.models import TokenLosses
from adapt_recipes.signals import BaseLosses, BaseWeights, base_losses, passes

EXAMPLES = tiny_examples(seed=4)


def entries(folder: Path) -> list[Path]:
    """All files of the cache, whatever they are."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def measure(
    model: TokenLosses, pool: list[MicroBatch], *, cache_dir: Path, tokens: passes.Tokens = "answer"
) -> torch.Tensor:
    losses = BaseLosses()
    losses.measure(model, pool, cache_dir=cache_dir, tokens=tokens)
    return losses.values


def without_forward(model: TokenLosses) -> TokenLosses:
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    return model


def test_they_are_the_mean_loss_of_each_example(tmp_path: Path) -> None:
    model = tiny_model()
    losses = measure(model, batched(EXAMPLES), cache_dir=tmp_path / "not" / "there")
    expected = torch.stack([alone(model, example)[0].double().mean() for _, example in EXAMPLES])
    assert losses.dtype == torch.float64 and model.training
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_second_call_reads_the_same_bits_without_the_model(tmp_path: Path) -> None:
    losses = measure(tiny_model(), batched(EXAMPLES), cache_dir=tmp_path)
    (file,) = entries(tmp_path)
    assert file.parent == tmp_path / "base_losses" and file.suffix == ".safetensors"
    again = measure(without_forward(tiny_model()), batched(EXAMPLES), cache_dir=tmp_path)
    assert torch.equal(again, losses) and entries(tmp_path) == [file]


def other_weight(model: TokenLosses, pool: list[MicroBatch], patch: Any) -> None:
    weight = model.decoder.layers[1].mlp.w2.weight.detach()  # type: ignore[index, union-attr]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


def other_token(model: TokenLosses, pool: list[MicroBatch], patch: Any) -> None:
    pool[0].tokens[0, 0] ^= 1


def other_label(model: TokenLosses, pool: list[MicroBatch], patch: Any) -> None:
    labels = pool[-1].labels
    labels[labels != IGNORE_INDEX] ^= 1


def other_rows(model: TokenLosses, pool: list[MicroBatch], patch: Any) -> None:
    rows = pool[-1].rows
    rows.copy_(rows.flip(0))


def other_lengths(model: TokenLosses, pool: list[MicroBatch], patch: Any) -> None:
    """A last token of 0 that is not supervised looks like padding."""
    pool[-1].lengths[0] += 1


def other_precision(model: TokenLosses, pool: list[MicroBatch], patch: Any) -> None:
    model.compute_dtype = torch.bfloat16


def other_weights_dtype(model: TokenLosses, pool: list[MicroBatch], patch: Any) -> None:
    model.bfloat16()


def other_number_of_threads(model: TokenLosses, pool: list[MicroBatch], patch: Any) -> None:
    patch.setattr(torch, "get_num_threads", lambda: 17)


def compiled(model: TokenLosses, pool: list[MicroBatch], patch: Any) -> None:
    """As ``compile: true`` does it, but for the compiler: its sums are rounded in another order."""
    model.decoder.layers[0].compile(backend="eager")  # type: ignore[index, union-attr, operator]


def other_torch(model: TokenLosses, pool: list[MicroBatch], patch: Any) -> None:
    patch.setattr(torch, "__version__", "2.99.0")


@pytest.mark.parametrize(
    "change",
    [
        other_weight,
        other_token,
        other_label,
        other_rows,
        other_lengths,
        other_precision,
        other_weights_dtype,
        other_number_of_threads,
        pytest.param(compiled, marks=pytest.mark.slow),
        other_torch,
    ],
    ids=lambda change: change.__name__,
)
def test_what_they_depend_on_gives_another_entry(
    change: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(tiny_model(), batched(EXAMPLES), cache_dir=tmp_path)
    model, pool = tiny_model(), batched(EXAMPLES)
    change(model, pool, monkeypatch)
    losses = measure(model, pool, cache_dir=tmp_path)
    assert len(entries(tmp_path)) == 2
    assert torch.equal(losses, passes.example_losses(model, pool))
    assert torch.equal(losses, measure(without_forward(model), pool, cache_dir=tmp_path))


def test_another_cut_into_batches_gives_another_entry(tmp_path: Path) -> None:
    """It may change the last bits."""
    for max_tokens in (1, 40):
        measure(tiny_model(), batched(EXAMPLES, max_tokens=max_tokens), cache_dir=tmp_path)
    assert len(entries(tmp_path)) == 2


def test_losses_of_all_tokens_have_another_entry(tmp_path: Path) -> None:
    model, pool = tiny_model(), batched(EXAMPLES)
    answers = measure(model, pool, cache_dir=tmp_path)
    both = measure(model, pool, cache_dir=tmp_path, tokens="all")
    assert len(entries(tmp_path)) == 2 and not torch.equal(answers, both)
    assert torch.equal(both, passes.example_losses(model, pool, tokens="all"))
    assert torch.equal(both, measure(without_forward(model), pool, cache_dir=tmp_path, tokens="all"))


@pytest.mark.parametrize(
    "setting",
    [{"num_heads": 8, "num_kv_heads": 4}, {"rope_base": 100}, {"scale_factor": 4}, {"norm_eps": 0.1}],
    ids=str,
)
def test_settings_that_show_in_no_weight_give_another_entry(setting: dict[str, Any], tmp_path: Path) -> None:
    one, other = tiny_model(), tiny_model(**setting)
    for ours, theirs in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    measure(one, batched(EXAMPLES), cache_dir=tmp_path)
    losses = measure(other, batched(EXAMPLES), cache_dir=tmp_path)
    assert len(entries(tmp_path)) == 2
    assert torch.equal(losses, passes.example_losses(other, batched(EXAMPLES)))


@pytest.mark.parametrize(
    "weights",
    [
        (torch.tensor(1.0), torch.tensor(2.0)),
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(4), torch.zeros(2, dtype=torch.float64)),
    ],
    ids=["without a dimension", "other shape", "other dtype"],
)
def test_any_other_weight_gives_another_entry(weights: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    for weight in weights:
        model = tiny_model()
        model.weight = torch.nn.Parameter(weight)
        measure(model, batched(EXAMPLES), cache_dir=tmp_path)
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:4]),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(bytes(len(file.read_bytes()))),
        lambda file: file.write_bytes(b"\xff" * 100),
        lambda file: file.write_text("not found"),
        lambda file: save_file({"other": torch.zeros(3)}, file),
    ],
    ids=["empty", "no header", "last byte missing", "zeros", "huge header", "a text", "something else"],
)
def test_a_damaged_entry_is_made_anew(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    losses = measure(tiny_model(), batched(EXAMPLES), cache_dir=tmp_path)
    (file,) = entries(tmp_path)
    damage(file)
    assert torch.equal(measure(tiny_model(), batched(EXAMPLES), cache_dir=tmp_path), losses)
    assert entries(tmp_path) == [file]
    assert torch.equal(load_file(file)["losses"], losses)


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=repr)
def test_nothing_half_written_stays(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it ever under the entry's own name."""
    names = []

    def interrupted(tensors: dict[str, torch.Tensor], path: Path) -> None:
        names.append(path.name)
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(base_losses, "save_file", interrupted)
    for _ in range(2):
        with pytest.raises(type(error)):
            measure(tiny_model(), batched(EXAMPLES), cache_dir=tmp_path)
        assert entries(tmp_path) == []
    monkeypatch.undo()
    measure(tiny_model(), batched(EXAMPLES), cache_dir=tmp_path)
    (file,) = entries(tmp_path)
    assert len({file.name, *names}) == 3, "two runs at a time do not write into one file"
    assert all(name.startswith(file.stem) for name in names)


# ---- the base model's weights


@pytest.mark.parametrize("adapters", [None, 0.0], ids=["whole model", "adapters"])
@pytest.mark.parametrize("raises", [False, True])
def test_a_model_becomes_the_base_model_and_is_restored(adapters: float | None, raises: bool) -> None:
    """Bit for bit, however often, and also when something raises. Weights that are not trained are not copied."""
    model, pool = tiny_model(lora_dropout=adapters), batched(EXAMPLES)
    trained = [(name, each) for name, each in model.named_parameters() if adapters is None or "lora" in name]
    model.requires_grad_(False)
    for _, parameter in trained:
        parameter.requires_grad_()
    expected, base = passes.example_losses(model, pool), BaseWeights(model)
    assert len(base._weights) == len(trained)
    for update in (1, 2):
        with torch.no_grad():
            for _, parameter in trained:
                parameter.add_(update * 0.1 * torch.randn_like(parameter))
        before = {name: each.detach().clone() for name, each in model.named_parameters()}
        trained[0][1].grad = torch.ones_like(trained[0][1])
        now = passes.example_losses(model, pool)
        try:
            with base.loaded_into(model):
                assert torch.equal(passes.example_losses(model, pool), expected)
                if raises:
                    raise RuntimeError
        except RuntimeError:
            assert raises
        assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
        assert torch.equal(passes.example_losses(model, pool), now) and not torch.equal(now, expected)
        assert (trained[0][1].grad == 1).all() and all(each.grad is None for _, each in trained[1:])
