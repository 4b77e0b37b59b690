"""Shards the weights of a model over the processes (FSDP2). On a single process the model is not sharded.

Every process has some rows of every weight, of its gradient and of its optimizer state, in the same dtypes as a single
process. The weights of a layer are gathered for its computation and freed afterwards, so no process ever has the whole
model in memory. Mixed precision is autocast, as on a single process, and not that of FSDP2.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchtune.modules.peft import LoRALinear

from adapt_recipes.training.process_group import LAUNCH_HINT, rank, world_size


@contextlib.contextmanager
def on_meta(enabled: bool = True) -> Iterator[None]:
    """Modules built in this context have their parameters on the meta device; their buffers are real.

    This takes no memory and draws no random numbers. ``shard`` allocates the parameters, ``load_weights`` loads them.

    Args:
        enabled: false: build as usual, for a model with random weights. Every process then has the same whole model in
            memory until ``shard``.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if not enabled or parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def shard(model: nn.Module, layers: Iterable[nn.Module], *, device: torch.device, cpu_offload: bool = False) -> None:
    """Shards the parameters over the processes, and allocates those on the meta device.

    Args:
        model: with activation checkpointing and compilation already applied. Weights that are in no layer are gathered
            while its ``forward`` runs.
        layers: each is gathered as a unit.
        device: of this process.
        cpu_offload: keep parameters, gradients and therefore the optimizer in host memory.

    Raises:
        ValueError: offloading on a single process, which FSDP2 does not support.
    """
    if cpu_offload and world_size() == 1:
        raise ValueError(f"fsdp_cpu_offload: needs several processes; {LAUNCH_HINT}")
    if world_size() > 1:
        mesh = init_device_mesh(device.type, (world_size(),))
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
        apply_fsdp(model, layers, mesh=mesh, policy=policy)
    home = torch.device("cpu") if cpu_offload else device
    model._apply(lambda tensor: torch.empty_like(tensor, device=home) if tensor.is_meta else tensor)


def apply_fsdp(model: nn.Module, layers: Iterable[nn.Module], *, mesh: DeviceMesh, policy: OffloadPolicy) -> None:
    """Replaces every parameter by this process's shard of it; one on the meta device stays there."""
    for module in (*layers, model):
        # False would be faster, but it keeps the root's weights gathered, and a probe that perturbs shards would miss
        # them.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)


@torch.no_grad()
def load_weights(decoder: nn.Module, weights: Mapping[str, Tensor], *, seed: int) -> None:
    """Loads weights into a decoder's parameters, or into this process's rows of them, one weight at a time.

    Args:
        decoder: sharded or not.
        weights: by the decoder's names; without adapters, which are initialized as in torchtune.
        seed: of the adapters.
    """
    parameters = decoder.state_dict()
    # Without ``items``, which would keep one weight in memory while it reads the next.
    for name in weights:
        fill(parameters[name], weights[name])
    generator = torch.Generator().manual_seed(seed)
    for module in decoder.modules():
        if isinstance(module, LoRALinear):
            a = torch.empty(module.lora_a.weight.shape)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            fill(module.lora_a.weight, a)
            fill(module.lora_b.weight, torch.zeros(module.lora_b.weight.shape))


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor, which all processes have to call; other tensors are returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, in the same memory; other tensors are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, weight: Tensor) -> None:
    """Copies a whole weight into a parameter, or this process's rows of it.

    FSDP2 splits like ``torch.chunk``: the last processes may have fewer rows.
    """
    if isinstance(parameter, DTensor):
        rows = math.ceil(len(weight) / world_size())
        weight = weight[rank() * rows : (rank() + 1) * rows]
    to_local(parameter).copy_(weight)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's computation. FSDP2 may keep parameters in host memory, but not buffers."""
    return next(chain(model.buffers(), model.parameters())).device


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> float:
    """Clips gradients to a norm of at most ``max_norm`` (None: no bound); returns the norm before, over all shards."""
    return float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))))
