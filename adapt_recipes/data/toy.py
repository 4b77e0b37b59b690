"""Tables to memorize: generated tasks that are learned at different speeds, with a known lowest loss."""

from __future__ import annotations

import math
import random
from string import ascii_lowercase, digits

from adapt_recipes.data.examples import Message, RawTask

NUM_FACTS = (2, 8, 32, 64, 128, 256, 512)
# The large tables need many rows: with 1,500 rows for 512 facts some facts never occur in training, and every mixture
# ends at the same loss.
NUM_TRAIN_ROWS = (8000, 6000, 4000, 3000, 4000, 6000, 10000)
NUM_NOISE_ROWS = 6000
NUM_KEYS = 1024
ANSWERS = ascii_lowercase[:16]
# Base 32: a key is two of these.
KEY_DIGITS = ascii_lowercase[:22] + digits


def toy_tasks(*, noise: bool = False, seed: int = 0, num_validation_rows: int = 256) -> list[RawTask]:
    """Seven random tables of 2 to 512 facts, and optionally a task of random labels, which cannot be learned.

    A prompt is three bytes: the table's letter and one of 1024 keys. Its answer is one of 16 letters. The task is to
    memorize, so training and validation rows come from the same table, and what is validated on is trained on: the
    exception to the rule that docs/data.md states. The noise task draws a new random label for every row.

    The names carry the number of facts (``facts_512``, ``noise``). The true entropies are 0, and ln 16 for noise.

    Args:
        noise: add the task of random labels.
        seed: of the tables and rows.
        num_validation_rows: validation rows per task.
    """
    rng = random.Random(f"toy {seed}")
    keys = [high + low for high in KEY_DIGITS for low in KEY_DIGITS]
    assert len(keys) == NUM_KEYS
    tasks = []
    for letter, num_facts, num_rows in zip("ABCDEFG", NUM_FACTS, NUM_TRAIN_ROWS, strict=True):
        table = [(key, rng.choice(ANSWERS)) for key in rng.sample(keys, num_facts)]
        train = [_row(letter, *rng.choice(table)) for _ in range(num_rows)]
        rng.shuffle(table)
        validation = [_row(letter, *table[i % num_facts]) for i in range(num_validation_rows)]
        tasks.append(RawTask(f"facts_{num_facts}", train, validation, entropy=0.0, memorized=True))
    if noise:
        train, validation = (
            [_row("N", rng.choice(keys), rng.choice(ANSWERS)) for _ in range(num_rows)]
            for num_rows in (NUM_NOISE_ROWS, num_validation_rows)
        )
        tasks.append(RawTask("noise", train, validation, entropy=math.log(len(ANSWERS)), memorized=True))
    return tasks


def _row(letter: str, key: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": letter + key}, {"role": "assistant", "content": answer}]
