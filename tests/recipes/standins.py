"""Stand-ins for what configs of real models and data expect: a tokenizer, and a few examples of each task."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
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


# Of ShareGPT, beside conversations that are examples: why each of these is none.
SHAREGPT_BAD_ROWS = (
    ([("gpt", "yes"), ("human", "sure?"), ("gpt", "yes")], "message 0 has the role 'assistant', expected 'user'"),
    ([], "'conversations' must be a list"),
    ([("human", "is it?"), ("gpt", "yes"), ("human", "sure?")], "the last message must be the assistant's"),
    ([("human", "is"), ("human", "it?"), ("gpt", "yes")], "message 1 has the role 'user', expected 'assistant'"),
    ([("human", "is it?"), ("gpt", "")], "message 1: the assistant's answer is empty"),
)


def write_mos_datasets(folder: Path, p3_configurations: Sequence[str]) -> None:
    """The datasets of MoS by their names on the hub, in its layout and with their oddities; answers are of few tokens.

    There are 12 examples of math, 16 of medical and 8 of dialogue; of nlp 4 of each configuration, 1 to validate on,
    and 1 to test on of the second one.
    """
    math = [
        {"source": f"data/CoT/{'gsm_rft' if i % 2 else 'MATH_train'}.json", "output": answer, "instruction": prompt}
        for i, (prompt, answer) in enumerate(_pairs("math", 12))
    ]
    path = folder / "TIGER-Lab" / "MathInstruct" / "MathInstruct.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(math, indent=4))

    medical = [
        {"output": answer, "instruction": prompt, "input": ("<noinput>", "", "a patient of 40 years")[i % 3]}
        for i, (prompt, answer) in enumerate(_pairs("medical", 16))
    ]
    _write_parquet(folder / "lavita" / "AlpaCare-MedInstruct-52k" / "data", "train", medical)

    dialogue = [[("human", prompt), ("gpt", answer)] for prompt, answer in _pairs("dialogue", 8)]
    dialogue[1] += [("human", "sure?"), ("gpt", "no")]
    dialogue[2].insert(0, ("system", "Answer."))
    dialogue[3] = [("user", dialogue[3][0][1]), ("chatgpt", dialogue[3][1][1])]
    for i, (turns, _) in enumerate(SHAREGPT_BAD_ROWS):
        dialogue.insert(2 * i, turns)
    rows = [
        {"id": f"QWJhYvA_{i}", "conversations": [{"from": role, "value": value} for role, value in turns]}
        for i, turns in enumerate(dialogue)
    ]
    path = folder / "anon8231489123" / "ShareGPT_Vicuna_unfiltered" / "ShareGPT_V3_unfiltered_cleaned_split.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(rows))
    # Of all of these, the config reads one.
    for name in ("ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json", "HTML_cleaned_raw_dataset/sg_90k_part1.json"):
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_text(json.dumps(rows[1:2]))

    p3 = folder / "bigscience" / "P3"
    card = []
    for i, name in enumerate((*p3_configurations, "ag_news_classify")):
        sizes = {"train": 4, "validation": 1} | ({"test": 1} if i == 1 else {})
        pairs = _pairs(name, sum(sizes.values()))
        for split, size in sizes.items():
            rows = [
                {"inputs": [*prompt.encode()], "inputs_pretokenized": f"{prompt}\n\n", "targets": [*answer.encode(), 1]}
                | {"targets_pretokenized": f"{answer}\n"}
                for prompt, answer in (next(pairs) for _ in range(size))
            ]
            _write_parquet(p3 / name, split, rows)
        card.append(
            {"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in sizes]}
        )
    (p3 / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n# P3\n")


def _pairs(name: str, number: int) -> Iterator[tuple[str, str]]:
    """Prompts, all different, and their answers."""
    rng = random.Random(name)
    return ((f"{name} {i} " + "x" * rng.randint(0, 20), rng.choice(["yes", "no"])) for i in range(number))


def _write_parquet(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
