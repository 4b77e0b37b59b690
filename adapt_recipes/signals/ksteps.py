"""What K look-ahead steps say about the mixture: K-step probing of TANDEM (arXiv 2606.04401), and its exact value.

From the weights theta as they are, with fresh training examples in every step, the same on both paths:

    (1)  theta_k+1  = theta_k  - eta * sum_i p_i grad L_i_k(theta_k)                                theta_0 = theta
    (2)  theta'_k+1 = theta'_k - eta * (sum_i p_i grad L_i_k(theta'_k) + lambda grad F(theta'_k))   theta'_0 = theta
    (3)  u_i = 1/K sum_k (L_i_k(theta_K) - L_i_k(theta'_K)) / lambda            ``kstep_differences``
    (4)  u_i = -dF(theta_K) / dp_i, by autograd through (1)                     ``kstep_gradients``

L_i_k is the mean loss of task i on the examples of step k, and F = sum_j w_j L_val_j the objective, with constant w.
Both u_i are the decrease of F per unit of p_i: a task whose training loss falls more when F is trained on as well helps
F. They are equal to first order in eta, eta * sum_k <grad L_i_k, grad F>. (3) needs no second derivatives, and its
error goes to 0 with eta * K and lambda. For K = 1 and lambda -> 0 it is eta <grad L_i(theta_1), grad F(theta_0)>, and
(4) is eta <grad L_i(theta_0), grad F(theta_1)>.

With ``last_layers`` the steps move the trained weights of the last transformer layers alone: neither those below, nor
the embeddings, the final norm and the head. theta then stands for these weights, in all four equations (ours).

That (3) measures losses on the examples of all K steps is ours: (4) depends on all, and more examples are less noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapt_recipes.mixture.interface import Mixture
from adapt_recipes.models import TokenLosses
from adapt_recipes.signals import passes
from adapt_recipes.signals.passes import IGNORE_INDEX, Batch
from adapt_recipes.training.process_group import world_size
from adapt_recipes.training.sharding import device_of


def last_layers(model: TokenLosses, number: int | None) -> list[nn.Parameter]:
    """The weights that the K steps move: those that train in the last layers.

    Args:
        model: of the run.
        number: of the layers; None: all weights that train, also those that are in no layer.

    Raises:
        ValueError: the model has fewer layers, or no weight of these trains.
    """
    if number is None:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = model.decoder.layers
    if number > len(layers):
        raise ValueError(f"probe.last_layers: {number}, but the model has {len(layers)} layers")
    moved = [parameter for layer in layers[-number:] for parameter in layer.parameters() if parameter.requires_grad]
    if not moved:
        raise ValueError(f"probe.last_layers: no weight of the last {number} layers is trained")
    return moved


def check_last_layers(number: int | None, mixture: Mixture, model: TokenLosses) -> None:
    """Refuses ``probe.last_layers`` where no look-ahead steps are taken, or where there are no such layers.

    Raises:
        ValueError: one line that names the key.
    """
    if number is not None and "kstep_differences" not in mixture.observes:
        needs = f"{type(mixture).__name__} does not observe kstep_differences, as AdaptKSteps does"
        raise ValueError(f"probe.last_layers is unused: mixture: {needs}; remove it")
    last_layers(model, number)


def kstep_differences(
    model: nn.Module,
    train: Sequence[Sequence[Batch]],
    validation: Sequence[Batch],
    probabilities: Tensor,  # (num_tasks,) float64
    weights: Tensor,  # (num_tasks,) float64
    *,
    learning_rate: float,
    validation_weight: float,
) -> Tensor:
    """u of (3). Two copies of the trainable weights are in memory besides a gradient.

    Args:
        model: see ``passes``; trainable weights in fp32 or float64.
        train: the training examples of each of the K steps.
        validation: the examples of the objective.
        probabilities: p of (1), the mixture.
        weights: w of F.
        learning_rate: eta of (1).
        validation_weight: lambda of (2), > 0.

    Returns:
        (num_tasks,) float64 on the CPU, nats per supervised token; NaN for a task without a training example.
    """
    arguments = (model, train, validation, probabilities)
    without = _losses_after(*arguments, torch.zeros_like(weights), learning_rate)
    with_objective = _losses_after(*arguments, validation_weight * weights, learning_rate)
    # (3): u_i = 1/K sum_k (L_i_k(theta_K) - L_i_k(theta'_K)) / lambda
    return (without - with_objective) / validation_weight


def _losses_after(
    model: nn.Module,
    train: Sequence[Sequence[Batch]],
    validation: Sequence[Batch],
    probabilities: Tensor,
    weights: Tensor,  # (num_tasks,) float64, lambda w; all 0: (1)
    learning_rate: float,
) -> Tensor:
    """1/K sum_k L_i_k after the K steps (1) or (2): (num_tasks,) float64."""
    with passes.restored(model):
        for batches in train:
            gradient = passes.loss_gradient(model, batches, probabilities)
            # Both gradients are of the weights before this step.
            added = passes.loss_gradient(model, validation, weights) if weights.any() else []
            # (1), (2): theta_k+1 = theta_k - eta * (sum_i p_i grad L_i_k + lambda grad F)
            passes.move(model, gradient, -learning_rate)
            if added:
                passes.move(model, added, -learning_rate)
            del gradient, added
        losses = [passes.task_losses(model, batches, len(probabilities)) for batches in train]
    return torch.stack(losses).mean(0)


def kstep_gradients(
    model: nn.Module,
    train: Sequence[Sequence[Batch]],
    validation: Sequence[Batch],
    probabilities: Tensor,  # (num_tasks,) float64
    weights: Tensor,  # (num_tasks,) float64
    *,
    learning_rate: float,
) -> Tensor:
    """u of (4), exact. The activations and weights of all K steps are in memory: for small models on one process.

    Args:
        model, train, validation, probabilities, weights, learning_rate: as for ``kstep_differences``.

    Returns:
        (num_tasks,) float64 on the CPU, nats per supervised token; NaN for a task without a training example.

    Raises:
        ValueError: there are several processes.
    """
    if world_size() > 1:
        raise ValueError("probe.estimator: backward through look-ahead steps needs one process; use finite_difference")
    p = probabilities.clone().requires_grad_()
    theta: Mapping[str, Tensor] = {
        name: weight.detach().clone().requires_grad_()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    # Other kernels of attention have no second derivatives.
    with passes.measuring(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for batches in train:
            loss = _weighted_loss(model, theta, batches, p)
            gradient = torch.autograd.grad(
                loss, list(theta.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
            # (1): theta_k+1 = theta_k - eta * sum_i p_i grad L_i_k(theta_k)
            theta = {name: w - learning_rate * g for (name, w), g in zip(theta.items(), gradient, strict=True)}
        objective = _weighted_loss(model, theta, validation, weights)
        # (4): u_i = -dF(theta_K) / dp_i
        (slope,) = torch.autograd.grad(objective, p)
    measured = sum(passes.num_supervised(batches, len(p)) for batches in train)
    return torch.where(torch.as_tensor(measured) > 0, -slope, torch.nan)


def _weighted_loss(model: nn.Module, theta: Mapping[str, Tensor], batches: Iterable[Batch], weights: Tensor) -> Tensor:
    """``sum_j weights_j * (mean loss of task j)`` with the weights ``theta``, a float64 scalar to differentiate."""
    batches, device = list(batches), device_of(model)
    token_weights = weights / passes.num_supervised(batches, len(weights)).clamp_min(1)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        losses = functional_call(model, dict(theta), (batch.tokens.to(device), batch.labels.to(device)))
        supervised = batch.labels.cpu() != IGNORE_INDEX
        tasks = batch.tasks.cpu()[:, None].expand_as(supervised)[supervised]
        total = total + (losses.double().cpu() * token_weights[tasks]).sum()
    return total
