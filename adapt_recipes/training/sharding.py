"""A model whose weights are spread over the processes (FSDP2), or, on one process, kept whole.

Every process holds some rows of every weight, its gradient and its optimizer state, in the same dtype as one process
would. A layer's weights are gathered as it computes, and dropped after it: no process ever holds the whole model.
Computation is as on one process, by autocast, and not by FSDP2's own mixed precision.
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
    """What is built in here has parameters without values, on the meta device; buffers are as ever.

    No memory is taken and no random number drawn, until ``shard`` makes room and ``load_weights`` fills it.

    Args:
        enabled: false: build as usual, for a model that starts from random weights: those of one process, which each
            process then holds whole until ``shard``.
    """

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if not enabled or parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def shard(model: nn.Module, layers: Iterable[nn.Module], *, device: torch.device, cpu_offload: bool = False) -> None:
    """Spreads the parameters over the processes, and gives those that have none yet memory on the device.

    Args:
        model: whole, checkpointed and compiled as it is to be. Gathers what is in no layer while its ``forward`` runs.
        layers: are each gathered as one.
        device: of this process.
        cpu_offload: keep parameters, gradients and so the optimizer in host memory.

    Raises:
        ValueError: one process alone, which FSDP2 does nothing for, is to offload.
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
    """The first half of ``shard``: every parameter becomes a shard of itself, and one without values stays so."""
    for module in (*layers, model):
        # False would be faster and keep the root's weights: a probe that moves the shards would not move those.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)


@torch.no_grad()
def load_weights(decoder: nn.Module, weights: Mapping[str, Tensor], *, seed: int) -> None:
    """Fills a decoder's parameters, or this process's rows of them, one weight at a time.

    Args:
        decoder: sharded or whole.
        weights: by the decoder's own names; all but adapters, which are drawn as torchtune draws them.
        seed: of the adapters.
    """
    parameters = decoder.state_dict()
    for name in weights:  # not ``items``, which would keep one weight while it reads the next
        _fill(parameters[name], weights[name])
    generator = torch.Generator().manual_seed(seed)
    for module in decoder.modules():
        if isinstance(module, LoRALinear):
            a = torch.empty(module.lora_a.weight.shape)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            _fill(module.lora_a.weight, a)
            _fill(module.lora_b.weight, torch.zeros(module.lora_b.weight.shape))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards, which all processes have to ask for; one that has none as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard, in the same memory; one that has none as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def device_of(model: nn.Module) -> torch.device:
    """Where it computes: FSDP2 may keep parameters in host memory, but no buffers."""
    return next(chain(model.buffers(), model.parameters())).device


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> float:
    """Scales gradients to a norm, over all shards, of at most ``max_norm`` (None: any); returns what it was."""
    return float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))))


def _fill(parameter: Tensor, weight: Tensor) -> None:
    """FSDP2 cuts as ``torch.chunk`` does: as many rows for each process, and fewer or none for the last ones."""
    if isinstance(parameter, DTensor):
        rows = math.ceil(len(weight) / world_size())
        weight = weight[rank() * rows : (rank() + 1) * rows]
    to_local(parameter).copy_(weight)
