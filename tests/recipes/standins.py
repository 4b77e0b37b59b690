"""Stand-ins for what configs of real models and data expect: a tokenizer, and a few examples of each task type."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, *, eos_token: str = "<|im_end|>", chat_template: str | None = CHATML) -> int:
    """A tokenizer of bytes and a few words, with a chat template; returns the number of its ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>", *({eos_token} - {"<|im_end|>"})],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the answer is yes or no", "user assistant question answer"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token, pad_token="<|im_end|>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return len(fast)


def write_natural_instructions(folder: Path, types: Sequence[str], *, num_examples: int) -> None:
    """A file of each task type, in the layout of Super-NaturalInstructions v2; answers are of two tokens."""
    (folder / "tasks").mkdir(parents=True)
    rng = random.Random(0)
    for number, category in enumerate(types):
        inputs = [f"{category} {i} " + "x" * rng.randint(0, 20) for i in range(num_examples)]
        instances = [
            {"id": str(i), "input": each, "output": [rng.choice(["yes", "no"])]} for i, each in enumerate(inputs)
        ]
        worked = [{"input": "is it?", "output": "yes", "explanation": "it is"}]
        content = {"Definition": ["Answer."], "Categories": [category], "Positive Examples": worked}
        content["Instances"] = instances
        (folder / "tasks" / f"task{number}.json").write_text(json.dumps(content))
