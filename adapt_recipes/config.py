"""``TrainConfig``: the keys that all recipes share. A recipe's ``Config`` inherits them and adds its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from adapt_recipes.budget import BudgetConfig
from adapt_recipes.data.load import TasksConfig
from adapt_recipes.strict import (
    FREE_AT_RESUME,
    NOT_COMPARED,
    STRICT,
    Component,
    Injected,
    command_line,
    load,
    to_dict,
)
from adapt_recipes.training.precision import DType

__all__ = [
    "FREE_AT_RESUME",
    "NOT_COMPARED",
    "STRICT",
    "Component",
    "Injected",
    "MixtureConfig",
    "Steps",
    "TrainConfig",
    "command_line",
    "load",
    "to_dict",
]

Steps = Annotated[int, Field(ge=0)]


class MixtureConfig(Component):
    """The mixture component, and where it starts."""

    start_from: str | None = None
    """a finished run with the same mixture component: what it has learned about tasks that this run has too, by name"""


@dataclass(kw_only=True, config=STRICT)
class TrainConfig:
    """The keys that every recipe's config has. A node with a `_component_` also takes the component's arguments."""

    recipe: str | None = None
    """the recipe that this config is for, by name or path; a shipped recipe called by name refuses another's"""
    strategy: str
    """name of the method that sets the mixture; configs and results have this name"""
    output_dir: Annotated[str, Field(min_length=1), FREE_AT_RESUME, NOT_COMPARED]
    """the run directory"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: Annotated[str | None, FREE_AT_RESUME] = None
    """cpu, cuda, ...; default: the best available"""
    dtype: DType = "bf16"
    """fp32; bf16: fp32 weights and optimizer, bf16 compute; pure_bf16: bf16 weights"""
    deterministic: bool = False
    """bit-equal runs on CUDA, slower; on the CPU runs always are"""

    model: Component
    """a torchtune builder"""
    tokenizer: Component
    checkpointer: Annotated[Component, FREE_AT_RESUME.of("save_dtype")]
    """the source of the weights, and the dtype of those in model/"""
    tasks: TasksConfig
    max_seq_len: PositiveInt
    """rendered tokens; longer examples are dropped and counted, never cut"""
    budget: BudgetConfig
    mixture: Annotated[
        MixtureConfig,
        Injected("task_names", "num_supervised_tokens", "budget_tokens", optional=("target_names", "target_weights")),
    ]

    optimizer: Annotated[Component, Injected("params")]
    lr_schedule: Component
    """a multiplier of the optimizer's learning rate, by the share of the budget spent in the middle of the step"""
    batch_size: PositiveInt | None = None
    """examples per optimizer step, all processes together; or give ``batch_tokens``"""
    batch_tokens: PositiveInt | None = None
    """supervised tokens per optimizer step, in whole examples; what a step takes too many, the next takes fewer"""
    sampling: Literal["tokens", "example", "dataset"] = "tokens"
    """tokens: p is a share of supervised tokens; example, dataset: the chance of an example, or of a whole step"""
    micro_batch_tokens: Annotated[PositiveInt, FREE_AT_RESUME] = 4096
    """bound on the tokens computed in one forward pass; padding is not computed, shared beginnings are once"""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    """keep only the inputs of layers, and compute the rest again in the backward pass"""
    activation_offloading: Annotated[bool, FREE_AT_RESUME] = False
    """keep the checkpointed activations in host memory"""
    loss_chunk_tokens: PositiveInt | None = None
    """supervised tokens whose logits are in memory at a time; default: all of a micro-batch"""
    fsdp_cpu_offload: Annotated[bool, FREE_AT_RESUME] = False
    """keep weights, gradients and optimizer in host memory; only with several processes"""

    checkpoint_every: Annotated[Steps, FREE_AT_RESUME, NOT_COMPARED] = 0
    """steps between checkpoints; 0: only at the end"""
    keep_checkpoints: Annotated[PositiveInt, FREE_AT_RESUME, NOT_COMPARED] = 1
    async_checkpointing: Annotated[bool, FREE_AT_RESUME, NOT_COMPARED] = False
    """copy to host memory, and write in the background"""
    validate_every: Annotated[Steps, FREE_AT_RESUME] = 0
    """steps between validations on the whole split; 0: only at the start and the end"""
    keep_best: Literal["worst", "mean", "target"] | None = None
    """keep the checkpoint of the lowest validation loss as well, and write it to model_best/ at the end: that of the
    worst task, the mean over tasks, or the mean over targets"""
    stop_after: Steps = 0
    """end the run after so many validations without a lower loss, as ``keep_best`` defines it; 0: only with the
    budget"""
    log_every: Annotated[Steps, FREE_AT_RESUME, NOT_COMPARED] = 10
    """steps between printed lines and metric logger calls; 0: only the first and last step. log.jsonl has every step"""
    metric_logger: Annotated[Component | None, FREE_AT_RESUME, NOT_COMPARED] = None
    resume: Annotated[bool, FREE_AT_RESUME, NOT_COMPARED] = False
    """continue from the newest checkpoint in output_dir; if there is none, start a new run"""
    change_budget: Annotated[bool, FREE_AT_RESUME, NOT_COMPARED] = False
    """with ``resume``: the budget may be another one, above what is spent; a finished run goes on"""

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.batch_tokens is None):
            found = "none" if self.batch_size is None else "both"
            raise ValueError(f"batch_size, batch_tokens: give exactly one of them, not {found}")
        if self.activation_offloading and not self.activation_checkpointing:
            raise ValueError("activation_offloading: needs activation_checkpointing; set both, or neither")
        if self.keep_best and not self.validate_every:
            raise ValueError("keep_best: needs validate_every, the steps between the validations it compares")
        if self.stop_after and not self.keep_best:
            raise ValueError("stop_after: needs keep_best, which says what progress is: worst, mean or target")
        if self.change_budget and not self.resume:
            raise ValueError("change_budget: needs resume, as it is for a run that has begun; set both, or neither")
        if self.micro_batch_tokens < self.max_seq_len:
            raise ValueError(
                f"micro_batch_tokens: {self.micro_batch_tokens} is less than max_seq_len, {self.max_seq_len}"
            )
