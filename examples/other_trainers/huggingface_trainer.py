"""The sampler, the budget and a mixture of this project inside another trainer: transformers' ``Trainer``.

    python examples/other_trainers/huggingface_trainer.py

The sampler draws each batch when the Trainer asks for it, the Trainer's losses go to the mixture, and the mixture's
shares go to the sampler. Replace the tiny model by any causal language model, and the toy tasks and the byte tokenizer
by those of any config. One process, no gradient accumulation; nothing saves the mixture, so such a run does not resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from adapt_recipes import data
from adapt_recipes.budget import Ledger
from adapt_recipes.mixture import AdaptForecast
from adapt_recipes.signals import TrainLosses

MAX_SEQ_LEN = 16  # tokens
BATCH_TOKENS = 64  # supervised tokens per step
UPDATE_EVERY = 10  # steps


class Batches(IterableDataset[dict[str, Tensor]]):
    """Batches drawn by the shares of the moment, until the budget is spent exactly."""

    def __init__(self, tasks: list[data.Task], *, budget_tokens: int) -> None:
        names, available = [task.name for task in tasks], [int(task.train.num_supervised.sum()) for task in tasks]
        self.mixture = AdaptForecast(task_names=names, num_supervised_tokens=available, budget_tokens=budget_tokens)
        self.ledger, self.train_losses = Ledger(budget_tokens, len(tasks)), TrainLosses(len(tasks))
        self.tasks, self.sampler = tasks, data.TokenSampler(tasks, seed=0)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        ledger = self.ledger
        while ledger.left:
            # By now the Trainer has trained on all batches before this one.
            if ledger.steps and ledger.steps % UPDATE_EVERY == 0:
                self.mixture.update(task_tokens=ledger.task_tokens.double(), train_losses=self.train_losses.mean())
                self.train_losses.reset()
            p, target = self.mixture.probabilities(), ledger.step_target(BATCH_TOKENS)
            draws = self.sampler.draw(p, target_tokens=target, max_tokens=ledger.left)
            # Labels beyond the budget are masked here.
            examples = [self.sampler.example(draw) for draw in draws]
            (batch,) = data.micro_batches(examples, [d.task for d in draws], max_tokens=len(draws) * MAX_SEQ_LEN)
            ledger.spend(data.count_tokens(draws, len(self.tasks)), unique=data.count_unique(draws), batches=[batch])
            yield {"input_ids": batch.tokens, "labels": batch.labels, "supervised_tasks": batch.supervised_tasks}


class MixtureTrainer(Trainer):
    """A Trainer whose losses, by task, go to the ``Batches`` that it trains on."""

    train_dataset: Batches

    def get_train_dataloader(self) -> DataLoader:
        # Not wrapped by accelerate, which draws one batch ahead, by the shares of the step before.
        return DataLoader(self.train_dataset, batch_size=None)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        # Labels are shifted already. Padding is on the right, where a causal model does not look.
        supervised = inputs["labels"] != data.IGNORE_INDEX
        logits = model(input_ids=inputs["input_ids"]).logits[supervised].float()
        losses = F.cross_entropy(logits, inputs["labels"][supervised], reduction="none")  # (num_supervised,) nats
        batches, tasks = self.train_dataset, inputs["supervised_tasks"].cpu()
        loss_sums = torch.zeros(len(batches.tasks), dtype=torch.float64)
        loss_sums.index_add_(0, tasks, losses.detach().cpu().double())
        batches.train_losses.add(loss_sums, torch.bincount(tasks, minlength=len(batches.tasks)))
        return losses.mean()


def train(model: PreTrainedModel, *, budget_tokens: int) -> Batches:
    """Trains on the toy tasks. Returns what the model was trained on, with the mixture and the ledger."""
    config = data.TasksConfig(_component_="adapt_recipes.data.toy_tasks")
    tasks = data.load_tasks(config, tokenizer=data.ByteTokenizer(supervise_end=False), max_seq_len=MAX_SEQ_LEN)
    batches = Batches(tasks, budget_tokens=budget_tokens)
    arguments = TrainingArguments(
        "runs/huggingface_trainer",
        max_steps=math.ceil(budget_tokens / BATCH_TOKENS),
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        logging_steps=20,
        save_strategy="no",
        report_to="none",
    )
    MixtureTrainer(model=model, args=arguments, train_dataset=batches).train()
    return batches


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=257, hidden_size=48, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    )
    trained_on = train(LlamaForCausalLM(sizes), budget_tokens=38_400)
    for number, task in enumerate(trained_on.tasks):
        p, tokens = trained_on.mixture.probabilities()[number], trained_on.ledger.task_tokens[number]
        print(f"{task.name:9}  p {p:.3f}  {tokens:5} supervised tokens")
    print(f"together   {trained_on.ledger.supervised_tokens} of {trained_on.ledger.budget_tokens}")
