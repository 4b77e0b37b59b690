"""``tune new``: a config for the user's own tasks and model, chosen by what is in them.

Every choice is a line of the config with its reason, to be edited there; none is made when the run starts.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
import yaml
from pydantic import TypeAdapter

from adapt_recipes import data, models
from adapt_recipes.data.chat_template import read_chat_templates
from adapt_recipes.data.conversations import error_prefix
from adapt_recipes.data.tokenizer_files import read_json
from adapt_recipes.display import count
from adapt_recipes.errors import warn
from adapt_recipes.files import atomic_file
from adapt_recipes.models.architecture import read_config
from adapt_recipes.planning.plan import Plan, make_plan

# The most prompts of a task that are held out to validate, and to test, and their largest share of its prompts.
HELD_OUT, HELD_OUT_SHARE = 64, 0.1
# A loss on the tenth of fewer prompts says nothing.
MIN_PROMPTS = 80
# The longest examples may be dropped, down to this quantile, where ``max_seq_len`` would be more than twice as long.
QUANTILE, LENGTH_STEP = 0.99, 64
# The budget is this share of the data, but at least so many steps of so many examples; where there are not as many, it
# is all of them, in steps of fewer examples.
FRACTION, MIN_STEPS, STEP_EXAMPLES, MIN_STEP_EXAMPLES = 0.1, 200, 16, 4
# Up to this share of the data a task is read at most once. Further epochs are worth nearly as much as new data up to
# the fourth (Muennighoff et al., arXiv 2305.16264).
ONCE, MAX_EPOCHS = 0.5, 4
# Mixture updates and validations in a run, and the examples per task that measure a loss for an update.
UPDATES, VALIDATIONS, PROBED = 50, 5, 16
# Below so many parameters the learning rate is 1e-4, else 1e-5, as in the shipped configs of real models.
SMALL_MODEL = 400e6
# The share of the memory that a run may take, and the most tokens computed at once, with a GPU and without.
MEMORY_SHARE, MICRO_BATCH = 0.8, (16384, 4096)

LEARNED = (
    "Learned: curves fitted to the losses so far plan the rest of the budget, at nearly no cost.",
    "What a mixture can gain with these tasks, a short pilot shows: tune plan --pilot 0.2",
)
BY_PILOT = ("The best of four by a pilot, for the mean and the worst loss alike.",)
NOTHING_TO_MIX = (
    "There is one task, and nothing to mix. `tune new --column NAME` makes a task of each value of a column.",
)

_SYSTEM_TURNS = [
    {"role": "system", "content": "system"},
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
]


class Found(NamedTuple):
    """What is in the tasks.

    Attributes:
        node: the ``tasks`` node: the source, and keys that its rows need.
        notes: a comment for keys of the node.
        lengths: (num_examples,) int64, rendered tokens of the examples of all tasks.
        supervised: supervised tokens of all of them.
        longest: rendered tokens that the model can read.
        prompts: of each task, the number of different prompts.
    """

    node: dict[str, Any]
    notes: dict[str, str]
    lengths: torch.Tensor
    supervised: int
    longest: int
    prompts: dict[str, int]

    def max_seq_len(self) -> tuple[int, str]:
        """For all examples, or without the longest ones if they are much longer than the others; and a comment."""
        quantile, highest = float(np.quantile(self.lengths.numpy(), QUANTILE)), int(self.lengths.max())
        enough = highest if highest <= 2 * quantile else math.ceil(quantile)
        length = min(self.longest, LENGTH_STEP * math.ceil(enough / LENGTH_STEP))
        dropped = int((self.lengths > length).sum())
        middle = int(self.lengths.median())
        about = f"tokens of an example: {middle:,} in the middle, {highest:,} at most"
        return length, f"Rendered {about}; {f'the {dropped:,} longest are dropped' if dropped else 'none is dropped'}."


def write_config(
    name: str,
    *,
    tasks: str,
    model: str,
    column: str | None,
    template: Path,
    load: Callable[[str, Path], Any],
    pilot: Callable[[Any, Plan], str] | None = None,
    say: Callable[[str], object] = lambda phase: None,
) -> tuple[Path, Any, Plan]:
    """Reads tasks and model, and writes NAME.yaml, which must not exist.

    Args:
        name: of the config and its strategy; a path with or without ``.yaml``.
        tasks: a file or folder of ``jsonl_tasks``, or a folder of ``hf_tasks`` or ``natural_instructions``.
        model: a Hugging Face folder.
        column: the column whose values are the tasks; None: a file, a split or a task type is one.
        template: copied beside the config if the model has no chat template.
        load: the config of a recipe, by the recipe's name, from a file.
        pilot: names the best mixture of ``planning.pilot`` for a config and its plan; None: there is no pilot.
        say: called with the name of each phase.

    Returns:
        The file, the config in it, and its plan.

    Raises:
        ValueError: the file exists, or tasks or model cannot be read; one line.
    """
    file = Path(name if name.endswith(".yaml") else f"{name}.yaml")
    own_template = None
    with error_prefix("--model"):
        settings = read_config(model, key="config.json")
        with torch.device("meta"):
            decoder = models.decoder_from_folder(model, max_seq_len=1)
        if not _has_template(Path(model)):
            own_template = file.with_suffix(".jinja")
    for each in filter(None, (file, own_template)):
        if each.exists():
            raise ValueError(f"{each} exists: remove it, or take another name")
    say("reading tasks")
    tokenizer = data.ChatTokenizer(model, chat_template=template if own_template else None)
    found = read_tasks(tasks, column, tokenizer, longest=settings.get("max_position_embeddings") or 2**20)
    mixture, why = ("AdaptForecast", LEARNED) if len(found.prompts) > 1 else ("uniform", NOTHING_TO_MIX)
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    draft = Draft(
        file.with_suffix(""), model, settings["model_type"], parameters, found, own_template, mixture=mixture, why=why
    )
    with atomic_file(file) as written:
        try:
            if own_template:
                shutil.copyfile(template, own_template)
            config, plan = draft.fit(written, load, say)
            if pilot and len(found.prompts) > 1:
                draft.mixture, draft.why = pilot(config, plan), BY_PILOT
                config, plan = draft.fit(written, load, say)
        except BaseException:
            if own_template:
                own_template.unlink(missing_ok=True)
            raise
    return file, config, plan


def read_tasks(path: str, column: str | None, tokenizer: data.ChatTokenizer, *, longest: int) -> Found:
    """Finds out the form of the tasks, and what they hold."""
    node: dict[str, Any] = {"_component_": f"adapt_recipes.data.{_source(Path(path))}", "path": path}
    notes: dict[str, str] = {}
    if column is not None:
        node |= {"task_per": "column", "column": column}
    try:
        tokenizer.encode(data.Conversation(_SYSTEM_TURNS, supervised=(2,)))
    except ValueError:
        node["system"] = "merge_into_user"
        notes["system"] = "The chat template has no system role."
    every = {"validation_examples": 1}
    try:
        loaded = _load(node | every, tokenizer, longest)
    except ValueError as error:
        # Rows that are no examples, if leaving them out mends it.
        try:
            loaded = _load(node | every | {"on_bad_rows": "skip"}, tokenizer, longest)
        except ValueError:
            raise error from None
        node["on_bad_rows"] = "skip"
        notes["on_bad_rows"] = "Left out: " + str(error).removesuffix("; tasks.on_bad_rows: skip leaves them out")
    parts = [[task.train, *filter(None, [task.validation])] for task in loaded]
    return Found(
        node,
        notes,
        torch.cat([part.lengths for some in parts for part in some]),
        sum(int(part.num_supervised.sum()) for some in parts for part in some),
        longest,
        {
            task.name: len(torch.cat([part.prompt_hashes for part in some]).unique())
            for task, some in zip(loaded, parts, strict=True)
        },
    )


@dataclass
class Draft:
    """A config to be written.

    Attributes:
        name: of the file, without its suffix.
        model: the folder.
        model_type, parameters: as its ``config.json`` says, and their number.
        found: what is in the tasks.
        template: a Jinja file in place of the model's own.
        mixture: a name in ``adapt_recipes.mixture``.
        why: comments about it.
        micro_batch_tokens, activation_checkpointing: as found by ``fit``.
        batch: the key that says how large a step is.
        steps: in the run.
    """

    name: Path
    model: str
    model_type: str
    parameters: int
    found: Found
    template: Path | None
    mixture: str
    why: Sequence[str]
    micro_batch_tokens: int = MICRO_BATCH[not torch.cuda.is_available()]
    activation_checkpointing: bool = False
    batch: str = "batch_tokens"
    steps: int = 0

    @property
    def recipe(self) -> str:
        return "sft_full_finetune" if self.mixture in ("uniform", "proportional") else "adapt_full_finetune"

    def fit(self, file: Path, load: Callable[[str, Path], Any], say: Callable[[str], object]) -> tuple[Any, Plan]:
        """Writes the config with the largest micro-batch that fits into memory; returns the config and its plan."""
        while True:
            file.write_text(self.text(), encoding="utf-8")
            config = load(self.recipe, file)
            plan = make_plan(config, say=say)
            if self.batch == "batch_tokens" and any(warning.startswith(self.batch) for warning in plan.warnings):
                # A step would hold few answers of some task.
                self.batch = "batch_size"
                continue
            if plan.steps != self.steps:
                # Updates and validations are so many in a run.
                self.steps = plan.steps
                continue
            used = plan.memory_bytes
            if used.total <= _memory() or self.activation_checkpointing:
                if used.total > _memory():
                    needs = f"{used.total / 1e9:.1f} GB, more than the {_memory() / 1e9:.1f} that it may take here"
                    warn(f"a run would need {needs}: start it on several GPUs, or train adapters (with_lora)")
                return config, plan
            # Activations are proportional to it, but for a little.
            share = (_memory() - (used.total - used.activations)) / used.activations
            smaller = math.floor(0.95 * share * config.micro_batch_tokens / LENGTH_STEP) * LENGTH_STEP
            self.activation_checkpointing = smaller < config.max_seq_len
            self.micro_batch_tokens = max(smaller, config.max_seq_len)

    def text(self) -> str:
        """The whole file."""
        found = self.found
        num_examples, enough = len(found.lengths), [n for n in found.prompts.values() if n >= MIN_PROMPTS]
        fewest = min(enough or found.prompts.values())
        fraction = min(1.0, max(FRACTION, _two_digits(MIN_STEPS * STEP_EXAMPLES / num_examples)))
        step_examples = max(MIN_STEP_EXAMPLES, min(STEP_EXAMPLES, round(fraction * num_examples / MIN_STEPS)))
        batch_tokens = max(1, round(step_examples * found.supervised / num_examples))
        max_seq_len, lengths = found.max_seq_len()
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        environment.filters["quoted"] = _quoted
        return environment.from_string(Path(__file__).with_name("new.yaml.jinja").read_text(encoding="utf-8")).render(
            recipe=self.recipe,
            file=self.name.with_suffix(".yaml"),
            strategy=self.name.name,
            dtype="bf16" if torch.cuda.is_available() else "fp32",
            model=self.model,
            model_type=self.model_type,
            parameters=self.parameters,
            small_model=SMALL_MODEL,
            template=self.template and str(self.template),
            tasks=found.node,
            notes=found.notes,
            num_tasks=len(found.prompts),
            num_examples=num_examples,
            supervised=found.supervised,
            fewest=fewest,
            small=[name for name, prompts in found.prompts.items() if enough and prompts < MIN_PROMPTS],
            min_prompts=MIN_PROMPTS,
            held_out=max(1, min(HELD_OUT, round(HELD_OUT_SHARE * fewest))),
            max_epochs=1 if fraction <= ONCE else MAX_EPOCHS,
            max_seq_len=max_seq_len,
            lengths=lengths,
            fraction=fraction,
            default_fraction=FRACTION,
            min_steps=MIN_STEPS,
            mixture=self.mixture,
            why=self.why,
            update_every=max(1, round(self.steps / UPDATES)),
            probed=PROBED,
            step_examples=step_examples,
            steps=self.steps,
            batch=self.batch,
            batch_tokens=batch_tokens,
            micro_batch_tokens=max(self.micro_batch_tokens, max_seq_len),
            activation_checkpointing=self.activation_checkpointing,
            memory_gb=_memory() / 1e9,
            validate_every=max(1, round(self.steps / VALIDATIONS)),
            count=count,
        )


def _source(path: Path) -> str:
    """The function of ``adapt_recipes.data`` that reads this."""
    path = path.expanduser()
    saved = ("dataset_dict.json", "state.json")
    if any((folder / name).is_file() for folder in (path, *path.glob("*/")) for name in saved):
        return "hf_tasks"
    if next(path.glob("tasks/*.json"), None):
        return "natural_instructions"
    return "jsonl_tasks"


def _load(node: dict[str, Any], tokenizer: data.ChatTokenizer, longest: int) -> list[data.Task]:
    config = TypeAdapter(data.TasksConfig).validate_python(node)
    return data.load_tasks(config, tokenizer=tokenizer, max_seq_len=longest)


def _has_template(folder: Path) -> bool:
    try:
        read_chat_templates(folder, read_json(folder / "tokenizer_config.json", optional=True), None)
    except ValueError:
        return False
    return True


def _memory() -> float:
    """Bytes that a run may take."""
    if torch.cuda.is_available():
        return MEMORY_SHARE * torch.cuda.mem_get_info()[1]
    return MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _two_digits(share: float) -> float:
    """At least ``share``, with two digits."""
    digits = 1 - math.floor(math.log10(share))
    return math.ceil(share * 10**digits) / 10**digits


def _quoted(value: Any) -> str:
    """A value in YAML, on one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
        .removesuffix("\n...\n")
        .strip()
    )
