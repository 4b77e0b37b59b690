"""Estimates the memory of a process by running a training step of the real model on fake tensors.

The model is built, sharded and run as in a recipe, with torch's fake tensors, which have no values, and for several
processes its fake process group. The estimate is the largest number of bytes of all tensors that exist at the same
time. Not included: memory of kernels, CUDA and nccl (1 to 2 GB), and memory that the allocator leaves unused (a few
percent).
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapt_recipes.data.packing import Group, PackedRows
from adapt_recipes.models import TokenLosses
from adapt_recipes.planning.update import Update
from adapt_recipes.signals import passes
from adapt_recipes.signals.ksteps import last_layers
from adapt_recipes.training.sharding import apply_fsdp, to_local

# The device of fake tensors, whatever the device of the run.
CPU = torch.device("cpu")


class Shape(NamedTuple):
    """The size of a process's largest micro-batch.

    Attributes:
        computed: positions computed.
        length: of a row.
        supervised: supervised positions of all rows.
        several: a step has more than one micro-batch, so that gradients exist while the next one is computed.
    """

    computed: int
    length: int
    supervised: int
    several: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs; their sum is the peak.

    Attributes:
        parameters: weights, or this process's shards of them, and buffers.
        gradients: of the trained weights.
        optimizer: its state.
        activations: the rest of a training step's peak: saved activations, logits, casts and gathered weights.
        mixture: additional memory of mixture updates, beyond a training step, and what they keep in host memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    mixture: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Size:
    """The size of a model on all processes together.

    Attributes:
        parameters: number of weights, a tied head counted once.
        trained: number of trained weights.
        checkpoint_bytes: weights and optimizer state on disk.
    """

    parameters: int
    trained: int
    checkpoint_bytes: int


def estimate_memory(
    model: TokenLosses,
    config: Any,
    shape: Shape,
    *,
    read: Shape | None = None,
    update: Update | None = None,
    num_processes: int = 1,
) -> tuple[Memory, Size]:
    """Estimates the memory of a run. ``torch.compile`` is ignored: it needs no more.

    Args:
        model: from ``models.build``, on the meta device. It cannot be used afterwards.
        config: of a recipe.
        shape, read: of the largest micro-batch in training, and in probes, validation and test (None: the same).
        update: the computation of a mixture update; None: there are no updates.
        num_processes: over which the weights are sharded.

    Raises:
        ValueError: the optimizer cannot run on fake tensors.
    """
    assert not dist.is_initialized()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = _num_bytes(model.state_dict().values())
    model.to("meta")
    read, update = read or shape, update or Update()
    with _frozen_gc(), _group(num_processes) as mesh, FakeTensorMode(), LiveBytes(fake=True) as live:
        # Build and shard the model, and run the optimizer and the largest forward and backward passes.
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        full_state, _ = _optimizer_bytes(config, [p for p in model.parameters() if p.requires_grad], live)
        if mesh is not None:
            apply_fsdp(model, model.decoder.layers, mesh=mesh, policy=OffloadPolicy())
            gc.collect()
        weights = live.now
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = _num_bytes(to_local(parameter.detach()) for parameter in trainable)
        shards = [nn.Parameter(to_local(parameter.detach())) for parameter in trainable]
        optimizer, stepping = _optimizer_bytes(config, shards, live)
        forward = weights + _forward_bytes(model, live, read)
        backward = of_update = _backward_bytes(model, live, shape)
        moved = last_layers(model, update.last_layers)
        kept = _num_bytes(to_local(parameter.detach()) for parameter in moved)
        if update.has_backward and (read != shape or update.last_layers):
            with passes.only_trained(model, moved):
                of_update = _backward_bytes(model, live, read)
    # The peak of a step: all gradients exist when the optimizer runs, if not before.
    training_peak = max(backward, weights + gradients + stepping, forward)

    # The peak of a mixture update. A dot product of gradients also needs the product of the largest weight's gradients.
    update_peak = forward + update.kept_in_forward * kept
    if update.has_backward:
        product = max(_num_bytes([to_local(parameter.detach())]) for parameter in moved)
        of_update = max(of_update, weights + kept + product)
        update_peak = max(update_peak, of_update + update.kept_in_backward * kept)
    memory = Memory(
        parameters=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=training_peak - weights - gradients,
        mixture=max(0, update_peak - training_peak) + update.kept_always * gradients,
    )
    return memory, Size(parameters, trained, saved + full_state)


def _forward_bytes(model: TokenLosses, live: LiveBytes, shape: Shape) -> int:
    """The peak of forward passes without gradients, besides the weights."""
    with torch.no_grad(), live.measured() as measured:
        model(*_batch(shape, live))
    return measured.peak


def _backward_bytes(model: TokenLosses, live: LiveBytes, shape: Shape) -> int:
    """The peak while a step computes its gradients, without the optimizer's state.

    In the second of several micro-batches the gradients exist, and so do the casts that autocast caches.
    """
    with model.autocast():
        for _ in range(2 if shape.several else 1):
            with live.measured() as measured:
                model(*_batch(shape, live)).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return measured.start + measured.peak


def _batch(shape: Shape, live: LiveBytes) -> tuple[Tensor, Tensor, Literal["losses"], PackedRows]:
    """Rows of the same length that share nothing, and a last one with the rest."""
    rows, rest = divmod(shape.computed, shape.length)
    live.batch = rows + bool(rest), shape.length
    live.supervised = shape.supervised
    tokens, flat = torch.zeros(live.batch, dtype=torch.int64), torch.zeros(shape.computed, dtype=torch.int64)
    groups = [Group(rows, shape.length, shape.length)] if rows else []
    groups += [Group(1, rest, rest)] if rest else []
    return tokens, tokens.clone(), "losses", PackedRows(flat, flat, tokens, tuple(groups))


def _optimizer_bytes(config: Any, parameters: Sequence[nn.Parameter], live: LiveBytes) -> tuple[int, int]:
    """Bytes of the optimizer's state for these parameters, and the additional peak of a step."""
    optimizer = config.optimizer.build(params=parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
        with live.measured() as measured:
            optimizer.step()
    except Exception as error:
        # Anything that an optimizer raises when it reads a value of a fake tensor.
        raise ValueError(
            f"optimizer: the memory of {config.optimizer.component} cannot be estimated: its step reads values of "
            f"tensors ({type(error).__name__})"
        ) from error
    finally:
        for parameter in parameters:
            parameter.grad = None
    states = [value for state in optimizer.state.values() for value in state.values()]
    return _num_bytes(value for value in states if isinstance(value, Tensor)), measured.peak


def _num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextlib.contextmanager
def _frozen_gc() -> Iterator[None]:
    """Excludes existing objects from garbage collections, which would otherwise take half of the time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _group(num_processes: int) -> Iterator[Any]:
    """The mesh of a fake process group, of which this process is the first; None for a single process."""
    if num_processes == 1:
        yield None
        return
    # The import registers the backend.
    import torch.testing._internal.distributed.fake_pg  # noqa: F401

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=num_processes)
    try:
        yield init_device_mesh("cpu", (num_processes,))
    finally:
        dist.destroy_process_group()


@dataclass
class Measured:
    """Bytes of tensors at the start of a block, and the most that were added until its end."""

    start: int
    peak: int = 0


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all existing tensors, each storage once however many views it has.

    Args:
        fake: for fake tensors, whose values are replaced: a mask over the whole ``batch`` is true at ``supervised``
            positions, and every number read from a tensor is 1.
    """

    def __init__(self, *, fake: bool = False) -> None:
        super().__init__()
        self.now = 0
        self.batch = 0, 0
        self.supervised = 0
        self._fake = fake
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self._measured = Measured(0)

    @contextlib.contextmanager
    def measured(self) -> Iterator[Measured]:
        # Tensors that only a reference cycle keeps would be collected in a long run.
        gc.collect()
        measured = self._measured = Measured(self.now)
        yield measured
        self._measured = Measured(self.now)

    def __enter__(self) -> LiveBytes:
        # FSDP2 frees gathered weights by resizing their storage to 0, which is not an operation on tensors.
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self._count(storage)

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Operations on the shards of a DTensor follow.
        if DTensor in types:
            return NotImplemented
        aten = torch.ops.aten
        if self._fake:
            if func in (aten._local_scalar_dense.default, aten.is_nonzero.default):
                return 1
            if func.overloadpacket in (aten.index, aten.index_put, aten._index_put_impl, aten._unsafe_index_put):
                args = (args[0], [*self._indices(args[1])], *args[2:])
        result = func(*args, **kwargs or {})
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            for storage in get_untyped_storages(tensor):
                self._count(storage)
        return result

    def _indices(self, indices: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
        """The indices, with a mask replaced by as many positions as it is true at."""
        for index in indices:
            if index is None or index.dtype != torch.bool:
                yield index
            else:
                count = self.supervised if index.shape == self.batch else index.numel()
                yield from torch.empty(index.dim(), count, dtype=torch.int64).unbind()

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._references:
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self._measured.peak = max(self._measured.peak, self.now - self._measured.start)

    def _forget(self, key: int) -> None:
        del self._references[key]
        self.now -= self._sizes.pop(key)
