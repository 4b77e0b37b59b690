r"""A source of tasks of one's own: a function that returns tasks as text; here three that a program writes.

    tune run sft_full_finetune --config yaml/tiny_uniform.yaml tasks=examples.own_tasks.digit_tasks ~tasks.noise \
        tokenizer.supervise_end=true max_seq_len=32 output_dir=runs/own_tasks

Start it in the folder above this one. Anything that Python can read can be a source: a database, files in a format of
your own. The recipe does the rest: tokens, cache, the validation split by the hash of the prompt, leaks, the budget.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from adapt_recipes.data import RawTask

TASKS: dict[str, Callable[[str], str]] = {
    "copy": lambda digits: digits,
    "reverse": lambda digits: digits[::-1],
    "sum": lambda digits: str(sum(map(int, digits))),
}


def digit_tasks(*, num_rows: int = 2000, num_digits: int = 4, seed: int = 0) -> list[RawTask]:
    """Copy, reverse and sum numbers: three tasks, of answers of different lengths.

    Every argument is a key of the node ``tasks`` in the config, beside those that all sources have, such as
    ``tasks.validation_examples``.

    Args:
        num_rows: examples per task, each with another prompt.
        num_digits: of each number.
        seed: of the numbers.

    Raises:
        ValueError: there are not so many numbers.
    """
    if num_rows > 10**num_digits:
        raise ValueError(f"tasks.num_rows: {num_rows} is more than the {10**num_digits} numbers of {num_digits} digits")
    tasks = []
    for name, answer in TASKS.items():
        # Seeded by the task's name, so that it keeps its rows when another task is added.
        numbers = random.Random(f"{seed} {name}").sample(range(10**num_digits), num_rows)
        rows = []
        for digits in (f"{number:0{num_digits}}" for number in numbers):
            # As in the chat format of OpenAI. All answers count in the loss, and nothing else does.
            turns = [{"role": "user", "content": f"{name} {digits}="}, {"role": "assistant", "content": answer(digits)}]
            rows.append(turns)
        tasks.append(RawTask(name, rows))
    return tasks
