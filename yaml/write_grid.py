"""Writes the configs of the grid, model x strategy x budget, into the folder that this file is in.

    python yaml/write_grid.py

Each config is whole in itself, to be read, copied and edited alone; what they share is written once, here. Another
study is another ``Grid`` in ``GRIDS``.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BATCH_SIZE = 64
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Model:
    """A model to start from.

    Attributes:
        title: what people call it.
        repository: on the model hub.
        options: of `tune download`.
        notes: for the header, in one line.
        builder: lines under ``model``.
        parameters: weights, a tied head counted once.
        vocab_size: logits of a token.
        activation_bytes: kept of a token for the backward pass, computing in bf16; counted in one layer, times layers.
    """

    title: str
    repository: str
    options: str
    notes: str
    builder: str
    parameters: int
    vocab_size: int
    activation_bytes: int

    @property
    def folder(self) -> str:
        return f"models/{self.repository.split('/')[1]}"

    def gigabytes(self, *, activation_checkpointing: bool = False) -> int:
        """What training takes on one device: reckoned, no run was measured.

        A weight takes 4 bytes, its gradient 4, AdamW 8 and its copy in bf16 2. An update of ADAPT has v in the place of
        the gradient and, once that is computed, a copy of the weights in fp32: more only where activations are not
        kept. One token in eight is taken to be supervised, with 16 bytes a logit: in bf16 and fp32, the gradients of
        both and the softmax. 5 % are for the rest.
        """
        weights = self.parameters * (20 if activation_checkpointing else 18)
        activations = 0 if activation_checkpointing else MICRO_BATCH_TOKENS * self.activation_bytes
        logits = MICRO_BATCH_TOKENS / 8 * self.vocab_size * 16
        return math.ceil(1.05 * (weights + activations + logits) / 1e9)


@dataclass(frozen=True)
class Strategy:
    """A way to set the mixture.

    Attributes:
        recipe: the file in ``recipes/``.
        title: for the header.
        mixture: lines under ``mixture``.
        passes: what an update costs for each example that it measures on, in forward passes; a backward pass is two.
        updates: for each budget in %, steps from one update to the next, and the examples a task that it measures on.
    """

    recipe: str
    title: str
    mixture: str
    passes: int = 0
    updates: Mapping[int, tuple[int, int]] | None = None


@dataclass(frozen=True)
class Grid:
    """What one study compares: each model with each strategy and each budget.

    Attributes:
        models, strategies: by what configs call them.
        budgets: in % of the supervised tokens there are; for each, the steps between validations and checkpoints.
        data: for the header: what the tasks are, how to get them, and what reading them takes.
        settings: for the header: which settings are the study's, and which ours.
        tasks: lines under ``tasks``.
        num_tasks: how many these are.
        num_examples: how many examples they hold, more or less.
    """

    models: Mapping[str, Model]
    strategies: Mapping[str, Strategy]
    budgets: Mapping[int, int]
    data: tuple[str, str, str]
    settings: str
    tasks: str
    num_tasks: int
    num_examples: int


# Ours: the paper's abstract gives the number alone. Spelled as in the collection.
TASK_TYPES = """\
    - Question Answering
    - Program Execution
    - Question Generation
    - Sentiment Analysis
    - Text Categorization
    - Text Matching
    - Toxic Language Detection
    - Cause Effect Classification
    - Information Extraction
    - Textual Entailment
    - Wrong Candidate Generation
    - Named Entity Recognition
    - Commonsense Classification
    - Fill in The Blank
    - Text Completion
    - Sentence Composition
    - Title Generation
    - Summarization
    - Coreference Resolution
    - Dialogue Generation"""

GATED = "Accept its licence on the hub first. The instruction-tuned one, for the base model brings no chat template."

ADAPT = Grid(
    models={
        "gemma3_1b": Model(
            title="Gemma 3 1B",
            repository="google/gemma-3-1b-it",
            options=" --hf-token TOKEN",
            notes=GATED,
            builder="""\
  _component_: adapt_recipes.models.gemma3_1b
  max_seq_len: ${max_seq_len}""",
            parameters=999_885_952,
            vocab_size=262_144,
            activation_bytes=26 * 119_092,
        ),
        "llama3_2_1b": Model(
            title="Llama 3.2 1B",
            repository="meta-llama/Llama-3.2-1B-Instruct",
            options=' --hf-token TOKEN --ignore-patterns "original/*"',
            notes=GATED,
            builder="""\
  _component_: torchtune.models.llama3_2.llama3_2_1b""",
            parameters=1_235_814_400,
            vocab_size=128_256,
            activation_bytes=16 * 135_304,
        ),
        "qwen3_0_6b": Model(
            title="Qwen3 0.6B",
            repository="Qwen/Qwen3-0.6B",
            options="",
            notes="It learns to answer behind an empty block of thoughts: ask it with enable_thinking=False.",
            builder="""\
  _component_: adapt_recipes.models.qwen3_0_6b
  max_seq_len: ${max_seq_len}""",
            parameters=596_049_920,
            vocab_size=151_936,
            activation_bytes=28 * 92_328,
        ),
    },
    strategies={
        "adapt": Strategy(
            recipe="adapt_full_finetune",
            title="ADAPT in the one-step form of the paper (our reading of it)",
            mixture="""\
  _component_: adapt_recipes.mixture.Adapt
  meta_lr: 0.1
  entropy_weight: 0.5""",
            passes=6,  # validation losses, their gradient (3), and training losses on both sides of the weights (2)
            updates={1: (40, 3), 5: (100, 8), 10: (200, 16)},
        ),
        "adapt_planned": Strategy(
            recipe="adapt_full_finetune",
            title="ADAPT with a measured response (ours, not the paper's)",
            mixture="""\
  _component_: adapt_recipes.mixture.AdaptPlanned""",
            passes=1,  # validation losses
            updates={1: (35, 16), 5: (70, 32), 10: (140, 64)},
        ),
        "uniform": Strategy(
            recipe="sft_full_finetune",
            title="The same share of supervised tokens for every task type (the paper's SFT-U)",
            mixture="""\
  _component_: adapt_recipes.mixture.uniform""",
        ),
        "proportional": Strategy(
            recipe="sft_full_finetune",
            title="Shares of supervised tokens by the size of the task type (the paper's SFT-P)",
            mixture="""\
  _component_: adapt_recipes.mixture.proportional""",
        ),
    },
    budgets={1: 200, 5: 500, 10: 1000},
    data=(
        "20 task types of Super-NaturalInstructions v2",
        "git clone https://github.com/allenai/natural-instructions data/natural-instructions",
        "Reading all of it takes some 25 GB of main memory: reckoned too.",
    ),
    settings="Model, data and budget are those of ADAPT (arXiv 2512.04555). Which task types, and all other settings, "
    "are ours; learning rate, schedule and batch size are as in MoS (arXiv 2406.08811).",
    tasks=f"""\
  _component_: adapt_recipes.data.natural_instructions
  path: data/natural-instructions
  types:
{TASK_TYPES}
  validation_examples: 64""",
    num_tasks=len(TASK_TYPES.splitlines()),
    num_examples=2_500_000,
)

GRIDS = (ADAPT,)


def configs() -> dict[str, str]:
    """{file name: content} of the whole grid."""
    return {
        f"{model}_{strategy}_{percent}pct.yaml": config(grid, model, strategy, percent)
        for grid in GRIDS
        for model in grid.models
        for strategy in grid.strategies
        for percent in grid.budgets
    }


def config(grid: Grid, model_name: str, strategy_name: str, percent: int) -> str:
    """The content of one config."""
    model, strategy, every = grid.models[model_name], grid.strategies[strategy_name], grid.budgets[percent]
    name = f"{model_name}_{strategy_name}_{percent}pct"
    memory, least_memory = model.gigabytes(), model.gigabytes(activation_checkpointing=True)
    millions = grid.num_examples / 1e6
    steps = percent / 100 * grid.num_examples / BATCH_SIZE
    length, updates = f"some {round(steps, -1):,.0f} steps", ""
    if strategy.updates:
        update_every, examples = strategy.updates[percent]
        cost = strategy.passes * grid.num_tasks * examples / (3 * BATCH_SIZE)  # in steps, whose passes are 3 an example
        length += f" and {steps // update_every:.0f} mixture updates"
        share = cost / (update_every + cost)
        updates = f"""\
# Counting passes over examples, an update costs {cost:.1f} steps: {100 * share:.1f} % of the time.
mixture_update_every: {update_every}
probe:
  examples: {examples}
"""
    tasks, data, reading = grid.data
    return f"""\
# tune run {strategy.recipe} --config yaml/{name}.yaml
#
{comment(f"{strategy.title}, on {model.title} and {tasks}, with {percent} % of their supervised tokens.")}
{comment(grid.settings)}
# Written by yaml/write_grid.py: change the table in there, or a copy of this file.
#
# Model:  tune download {model.repository} --output-dir {model.folder}{model.options}
#         {model.notes}
# Data:   {data}
# Memory: {memory} GB on one GPU, {least_memory} GB with activation_checkpointing=true: reckoned, not measured.
#         {reading}
# Length: {length}, more where short answers are drawn; {millions} million examples assumed.

strategy: {strategy_name}
output_dir: runs/{name}
resume: true
seed: 0

dtype: bf16  # fp32 weights and optimizer, bf16 compute

model:
{model.builder}
tokenizer:
  _component_: adapt_recipes.data.ChatTokenizer
  path: {model.folder}
checkpointer:
  _component_: adapt_recipes.models.HuggingFaceCheckpointer
  checkpoint_dir: {model.folder}

tasks:
{grid.tasks}
max_seq_len: 1024
budget:
  fraction: {percent / 100}

mixture:
{strategy.mixture}
{updates}
optimizer:
  _component_: torch.optim.AdamW
  lr: 1.0e-5
  weight_decay: 0.0
  fused: true
lr_schedule:
  _component_: adapt_recipes.training.schedule.linear
  warmup: 0.1
batch_size: {BATCH_SIZE}
micro_batch_tokens: {MICRO_BATCH_TOKENS}
clip_grad_norm: 1.0

checkpoint_every: {every}
keep_checkpoints: 1
validate_every: {every}
log_every: 10
"""


def comment(text: str) -> str:
    """Lines of a comment."""
    return textwrap.fill(text, 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


if __name__ == "__main__":
    for name, content in configs().items():
        (Path(__file__).parent / name).write_text(content, encoding="utf-8")
