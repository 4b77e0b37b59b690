"""Writes the configs of the grid, model x strategy x budget, into the folder that this file is in.

    python yaml/write_grid.py

Each config is complete, so that it can be read, copied and edited alone; what they share is written once, here. Another
study is another ``Grid`` in ``GRIDS``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BATCH_SIZE = 64
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Model:
    """A base model.

    Attributes:
        title: its name.
        repository: on the model hub.
        options: of `tune download`.
        notes: for the header.
        builder: lines under ``model``.
        remedy: for the header, in lines: what to do if it does not fit in memory.
    """

    title: str
    repository: str
    options: str
    notes: str
    builder: str
    remedy: str = ""

    @property
    def folder(self) -> str:
        return f"models/{self.repository.split('/')[1]}"


@dataclass(frozen=True)
class Strategy:
    """A method that sets the mixture.

    Attributes:
        recipe: the file in ``recipes/``.
        title: for the header.
        mixture: lines under ``mixture``.
        reward: lines under ``reward``, for a mixture that learns from rewards.
        passes: cost of an update per example that it reads, in forward passes; a backward pass counts as two.
        updates: for each budget, steps between updates, and the examples per task that an update reads.
        shares: for the header, in lines: what the shares refer to; ``{name}`` is that of the config.
    """

    recipe: str
    title: str
    mixture: str
    reward: str = ""
    passes: int = 0
    updates: Mapping[str, tuple[int, int]] | None = None
    shares: str = ""


@dataclass(frozen=True)
class Budget:
    """A budget.

    Attributes:
        setting: line under ``budget``.
        title: for the header.
        epochs: over all the data.
        every: steps between validations and checkpoints.
    """

    setting: str
    title: str
    epochs: float
    every: int


@dataclass(frozen=True)
class Grid:
    """The configs of one study: each model with each strategy and each budget.

    Attributes:
        models, strategies, budgets: by their names in the names of configs.
        data: for the header: the tasks, how to get them (in one line or more), and the memory to read them.
        settings: for the header: which settings are those of the paper, and which ours.
        tasks: lines under ``tasks``.
        num_tasks: number of tasks.
        num_examples: approximate number of examples.
    """

    models: Mapping[str, Model]
    strategies: Mapping[str, Strategy]
    budgets: Mapping[str, Budget]
    data: tuple[str, str, str]
    settings: str
    tasks: str
    num_tasks: int
    num_examples: int


# Ours: the paper's abstract gives only their number. Spelled as in the collection.
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

GATED = "Accept its license on the hub first. It is the instruction-tuned model: the base model has no chat template."

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
        ),
        "llama3_2_1b": Model(
            title="Llama 3.2 1B",
            repository="meta-llama/Llama-3.2-1B-Instruct",
            options=' --hf-token TOKEN --ignore-patterns "original/*"',
            notes=GATED,
            builder="""\
  _component_: torchtune.models.llama3_2.llama3_2_1b""",
        ),
        "qwen3_0_6b": Model(
            title="Qwen3 0.6B",
            repository="Qwen/Qwen3-0.6B",
            options="",
            notes="It is trained with an empty thinking block: prompt it with enable_thinking=False.",
            builder="""\
  _component_: adapt_recipes.models.qwen3_0_6b
  max_seq_len: ${max_seq_len}""",
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
            # Validation losses, their gradient (3), and training losses on both sides of the weights (2).
            passes=6,
            updates={"1pct": (40, 3), "5pct": (100, 8), "10pct": (200, 16)},
        ),
        "adapt_planned": Strategy(
            recipe="adapt_full_finetune",
            title="ADAPT with a measured response (ours, not the paper's)",
            mixture="""\
  _component_: adapt_recipes.mixture.AdaptPlanned""",
            # Validation losses.
            passes=1,
            updates={"1pct": (35, 16), "5pct": (70, 32), "10pct": (140, 64)},
        ),
        "uniform": Strategy(
            recipe="sft_full_finetune",
            title="The same share of supervised tokens for every task type (the paper's SFT-U)",
            mixture="""\
  _component_: adapt_recipes.mixture.uniform""",
        ),
        "proportional": Strategy(
            recipe="sft_full_finetune",
            title="Shares of supervised tokens proportional to the size of the task type (the paper's SFT-P)",
            mixture="""\
  _component_: adapt_recipes.mixture.proportional""",
        ),
    },
    budgets={
        "1pct": Budget("fraction: 0.01", "1 % of their supervised tokens", epochs=0.01, every=200),
        "5pct": Budget("fraction: 0.05", "5 % of their supervised tokens", epochs=0.05, every=500),
        "10pct": Budget("fraction: 0.1", "10 % of their supervised tokens", epochs=0.1, every=1000),
    },
    data=(
        "20 task types of Super-NaturalInstructions v2",
        "git clone https://github.com/allenai/natural-instructions data/natural-instructions",
        "Reading all of the data takes about 25 GB of main memory (an estimate as well).",
    ),
    settings="Model, data and budget are those of ADAPT (arXiv 2512.04555). The choice of task types and all other "
    "settings are ours; learning rate, schedule and batch size are as in MoS (arXiv 2406.08811).",
    tasks=f"""\
  _component_: adapt_recipes.data.natural_instructions
  path: data/natural-instructions
  types:
{TASK_TYPES}
  validation_examples: 64""",
    num_tasks=len(TASK_TYPES.splitlines()),
    num_examples=2_500_000,
)

SCORER = """\
  _component_: adapt_recipes.mixture.Scorer
  prior: uniform
  # The paper's rate. It changes shares by a few hundredths in a whole run; optimizer: adam changes them more.
  learning_rate: 1.0e-4
  # The weight of the old reward; the paper's beta = 0.9 is that of the new one.
  ema_decay: 0.1"""
SCORER_UPDATES = {"3ep": (100, 64)}
SHARES = """\
of supervised tokens. The paper's shares are of batches, as in the configs that learn from rewards. This
command uses shares of batches (sizes are in supervised tokens there too):
tune run mos_full_finetune --config yaml/{name}.yaml sampling=dataset"""

MOS = Grid(
    models={
        "qwen1_5_0_5b": Model(
            title="Qwen1.5 0.5B",
            repository="Qwen/Qwen1.5-0.5B-Chat",
            options="",
            notes="Its chat template adds a default system message if there is none.",
            builder="""\
  _component_: adapt_recipes.models.qwen1_5_0_5b
  max_seq_len: ${max_seq_len}""",
        ),
        "gemma_2b": Model(
            title="Gemma 2B",
            repository="google/gemma-2b-it",
            options=' --hf-token TOKEN --ignore-patterns "*.gguf"',
            notes=f"{GATED}\nIts template accepts no system message.",
            builder="""\
  _component_: torchtune.models.gemma.gemma_2b""",
        ),
        "llama3_8b": Model(
            title="Llama 3 8B",
            repository="meta-llama/Meta-Llama-3-8B-Instruct",
            options=' --hf-token TOKEN --ignore-patterns "original/*"',
            notes=GATED,
            builder="""\
  _component_: torchtune.models.llama3.llama3_8b""",
            remedy="""\
It does not fit on one GPU of 80 GB, but on 4 with activation_checkpointing=true. On one GPU, LoRA takes about
36 GB (estimated; the settings are ours), with activation_checkpointing=true and
model=torchtune.models.llama3.lora_llama3_8b 'model.lora_attn_modules=[q_proj,v_proj]' optimizer.lr=1e-4""",
        ),
    },
    strategies={
        "mos_cossim": Strategy(
            recipe="mos_full_finetune",
            title="MoS with transferability as its reward (CosSim: the similarity of a dataset to all of them)",
            mixture=SCORER,
            reward="""\
  _component_: adapt_recipes.signals.rewards.CosineSimilarity""",
            # Hidden states.
            passes=1,
            updates=SCORER_UPDATES,
        ),
        "mos_diff": Strategy(
            recipe="mos_full_finetune",
            title="MoS with difficulty as its reward (Diff: the remaining difficulty of a dataset)",
            mixture=SCORER,
            reward="""\
  _component_: adapt_recipes.signals.rewards.PerplexityRatio""",
            # Losses; those of the base model are measured once.
            passes=1,
            updates=SCORER_UPDATES,
        ),
        "mospec_cossim": Strategy(
            recipe="mos_full_finetune",
            title="MoSpec, MoS for one target dataset, with transferability as its reward (CosSim: the similarity of a "
            "dataset to the target)",
            mixture=SCORER,
            reward="""\
  _component_: adapt_recipes.signals.rewards.CosineSimilarity
  # The target dataset; the choice is ours.
  specialist: math""",
            passes=1,
            updates=SCORER_UPDATES,
        ),
        "mospec_diff": Strategy(
            recipe="mos_full_finetune",
            title="MoSpec, MoS for one target dataset, with difficulty as its reward (Diff: the remaining difficulty "
            "of a dataset, doubled for the target)",
            mixture=SCORER,
            reward="""\
  _component_: adapt_recipes.signals.rewards.PerplexityRatio
  # The target dataset; the choice is ours.
  specialist: math""",
            passes=1,
            updates=SCORER_UPDATES,
        ),
        "multidds": Strategy(
            recipe="mos_full_finetune",
            title="MultiDDS-S, a baseline of the paper (the effect of a step on one dataset on all of them)",
            mixture=SCORER,
            reward="""\
  _component_: adapt_recipes.signals.rewards.GradientAlignment""",
            # Gradients of validation losses (3) and of training losses (3).
            passes=6,
            updates=SCORER_UPDATES,
        ),
        "multiuat": Strategy(
            recipe="mos_full_finetune",
            title="MultiUAT, a baseline of the paper (how uncertain the model is of a dataset's answers)",
            mixture=SCORER,
            reward="""\
  _component_: adapt_recipes.signals.rewards.Uncertainty
  # Ours; PreTP is near 1 for any long answer.
  measure: EntSent""",
            # The models have no dropout: one forward pass instead of 30 with dropout.
            passes=1,
            updates=SCORER_UPDATES,
        ),
        "temperature": Strategy(
            recipe="sft_full_finetune",
            title="Shares proportional to the 10th root of the dataset's size (the paper's temperature baseline)",
            mixture="""\
  _component_: adapt_recipes.mixture.temperature
  temperature: 10""",
            shares=SHARES,
        ),
        "proportional": Strategy(
            recipe="sft_full_finetune",
            title="Shares proportional to the size of the dataset (the paper's proportional baseline)",
            mixture="""\
  _component_: adapt_recipes.mixture.proportional""",
            shares=SHARES,
        ),
        "uniform": Strategy(
            recipe="sft_full_finetune",
            title="The same share for every dataset (the paper's uniform baseline)",
            mixture="""\
  _component_: adapt_recipes.mixture.uniform""",
            shares=SHARES,
        ),
    },
    budgets={"3ep": Budget("epochs: 3", "three times their supervised tokens", epochs=3, every=1000)},
    data=(
        "four datasets",
        """\
write math.jsonl, medical.jsonl, dialogue.jsonl and nlp.jsonl into data/mos/
A line is {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "response": ...}.
The paper's datasets are, in this order, MathInstruct (TIGER-Lab/MathInstruct on the hub), MedInstruct (52k,
in XZhang97666/AlpaCare on GitHub), ShareGPT (several copies on the hub) and P3 (bigscience/P3 on the hub).
You have to convert them, and to choose a copy of ShareGPT and a part of P3: the paper's choice is not known.
Examples longer than max_seq_len are dropped, and ShareGPT has many: split those, or raise it.""",
        "Reading all of the data takes about 6 GB of main memory (an estimate as well).",
    ),
    settings="Model, datasets, epochs, learning rate, schedule, batch size and the scorer's settings are those of MoS "
    "(arXiv 2406.08811), as are 100 steps between updates and 64 examples of each dataset per update. All else is "
    "ours, including max_seq_len and the model's chat variant.",
    tasks="""\
  _component_: adapt_recipes.data.jsonl_tasks
  path: data/mos/
  validation_examples: 64""",
    num_tasks=4,
    num_examples=500_000,
)

GRIDS = (ADAPT, MOS)


def configs() -> dict[str, str]:
    """{file name: content} of the whole grid."""
    return {
        f"{model}_{strategy}_{budget}.yaml": config(grid, model, strategy, budget)
        for grid in GRIDS
        for model in grid.models
        for strategy in grid.strategies
        for budget in grid.budgets
    }


def config(grid: Grid, model_name: str, strategy_name: str, budget_name: str) -> str:
    """The content of one config."""
    model, strategy, budget = grid.models[model_name], grid.strategies[strategy_name], grid.budgets[budget_name]
    name = f"{model_name}_{strategy_name}_{budget_name}"
    millions = grid.num_examples / 1e6
    steps = budget.epochs * grid.num_examples / BATCH_SIZE
    length, learning = f"some {round(steps, -1):,.0f} steps", ""
    if strategy.reward:
        learning = f"""\
reward:
{strategy.reward}
# Each batch is of one dataset, as in the paper; with tokens, shares are of supervised tokens.
sampling: dataset
"""
    if strategy.updates:
        update_every, examples = strategy.updates[budget_name]
        # In training steps, which count 3 forward passes per example.
        cost = strategy.passes * grid.num_tasks * examples / (3 * BATCH_SIZE)
        length += f" and {steps // update_every:.0f} mixture updates"
        share = cost / (update_every + cost)
        learning += f"""\
# An update costs {cost:.1f} steps: {100 * share:.1f} % of training time (by forward and backward passes over examples).
mixture_update_every: {update_every}
probe:
  examples: {examples}
"""
    shares = f"# Shares: {lines(strategy.shares.format(name=name))}\n" if strategy.shares else ""
    tasks, data, reading = grid.data
    return f"""\
# tune run {strategy.recipe} --config yaml/{name}.yaml
#
{comment(f"{strategy.title}, on {model.title} and {tasks}, with {budget.title}.")}
{comment(grid.settings)}
# Written by yaml/write_grid.py: change the tables in there, or a copy of this file.
#
# Model:  tune download {model.repository} --output-dir {model.folder}{model.options}
#         {lines(model.notes)}
# Data:   {lines(data)}
# Memory: docs/scaling.md lists the GPUs it fits on; for N GPUs and your data, estimate it with
#         tune plan --nproc_per_node N {strategy.recipe} --config yaml/{name}.yaml
#         {lines(model.remedy, reading)}
# Length: {length}, more if short answers are drawn; {millions} million examples assumed.
{shares}
recipe: {strategy.recipe}
strategy: {strategy_name}
output_dir: runs/{name}
resume: true
seed: 0

# fp32 weights and optimizer, bf16 compute.
dtype: bf16

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
  {budget.setting}

mixture:
{strategy.mixture}
{learning}
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

checkpoint_every: {budget.every}
keep_checkpoints: 1
validate_every: {budget.every}
log_every: 10
"""


def lines(*texts: str) -> str:
    """A part of the header: further lines are aligned with the first one."""
    return "\n#         ".join(line for text in texts for line in text.splitlines())


def comment(text: str) -> str:
    """Lines of a comment."""
    return textwrap.fill(text, 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


if __name__ == "__main__":
    for name, content in configs().items():
        (Path(__file__).parent / name).write_text(content, encoding="utf-8")
