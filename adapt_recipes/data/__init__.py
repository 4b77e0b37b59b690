"""Tasks: their sources, their tokens, their splits, and the order in which a run reads them."""

from adapt_recipes.data.batching import MicroBatch, build_batches, micro_batches
from adapt_recipes.data.byte_tokenizer import ByteTokenizer
from adapt_recipes.data.chat import ChatTokenizer
from adapt_recipes.data.combine import task_per_source
from adapt_recipes.data.examples import IGNORE_INDEX, Conversation, Example, Examples, LeftOut, RawTask, Task
from adapt_recipes.data.hf import hf_tasks
from adapt_recipes.data.jsonl import jsonl_tasks
from adapt_recipes.data.load import (
    TasksConfig,
    build_tasks,
    fingerprint,
    load_tasks,
    max_token,
    split_targets,
    target_arguments,
)
from adapt_recipes.data.natural_instructions import natural_instructions
from adapt_recipes.data.prepare import prepare_tasks
from adapt_recipes.data.sampler import (
    Draw,
    TokenSampler,
    count_tokens,
    count_unique,
    draw_names,
    random_examples,
    random_indices,
    test_examples,
    validation_examples,
)
from adapt_recipes.data.toy import toy_tasks

__all__ = [
    "IGNORE_INDEX",
    "ByteTokenizer",
    "ChatTokenizer",
    "Conversation",
    "Draw",
    "Example",
    "Examples",
    "LeftOut",
    "MicroBatch",
    "RawTask",
    "Task",
    "TasksConfig",
    "TokenSampler",
    "build_batches",
    "build_tasks",
    "count_tokens",
    "count_unique",
    "draw_names",
    "fingerprint",
    "hf_tasks",
    "jsonl_tasks",
    "load_tasks",
    "max_token",
    "micro_batches",
    "natural_instructions",
    "prepare_tasks",
    "random_examples",
    "random_indices",
    "split_targets",
    "target_arguments",
    "task_per_source",
    "test_examples",
    "toy_tasks",
    "validation_examples",
]
