"""Memory that a process needs, without taking it: one training step of the real model on tensors without values.

The model is built, sharded and run as in a recipe, by torch's fake tensors and, for several processes, its fake process
group; what is counted are the bytes of all tensors that live at a time. What kernels take for themselves, CUDA and nccl
(1 to 2 GB) and what the allocator leaves unused (a few per cent) come on top.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

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

from adapt_recipes.models import TokenLosses
from adapt_recipes.planning.update import Update
from adapt_recipes.training.sharding import apply_fsdp, to_local

CPU = torch.device("cpu")  # fake tensors say that they are on it, whatever device the run will have


class Shape(NamedTuple):
    """The largest micro-batch of a process.

    Attributes:
        rows: sequences.
        length: positions of each, padding included.
        supervised: of all of them the positions that are.
        several: whether a step has more than one, so that gradients are there already while another is computed.
    """

    rows: int
    length: int
    supervised: int
    several: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs: their sum is what it has in memory at the most.

    Attributes:
        parameters: weights, or this process's shards of them, and buffers.
        gradients: of what is trained.
        optimizer: its state.
        activations: the rest of a training step's peak: what the backward needs, logits, casts and gathered weights.
        mixture: what mixture updates need beyond a training step.
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
    """How large a model is, all processes together.

    Attributes:
        parameters: weights, a tied head counted once.
        trained: those that are trained.
        checkpoint_bytes: weights and optimizer state, as a checkpoint has them on disk.
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
    """What a run of a config needs. ``torch.compile`` is left out of account: it needs no more.

    Args:
        model: of ``models.build``, without values. It is of no use afterwards.
        config: of a recipe.
        shape: of training's largest micro-batch.
        read: of the largest one that validation and probes read; None: the same.
        update: what mixture updates do; None: there are none.
        num_processes: that share the weights.

    Raises:
        ValueError: an optimizer that cannot be run without values.
    """
    assert not dist.is_initialized()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = _num_bytes(model.state_dict().values())
    model.to("meta")  # its buffers
    read, update = read or shape, update or Update()
    with _old_objects_aside(), _group(num_processes) as mesh, FakeTensorMode(), LiveBytes(without_values=True) as live:
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        whole_state, _ = _optimizer_bytes(config, [p for p in model.parameters() if p.requires_grad], live)
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
        if update.has_backward and read != shape:
            of_update = _backward_bytes(model, live, read)
    # All gradients are there at the latest when the optimizer steps.
    training_peak = max(backward, weights + gradients + stepping, forward)
    update_peak = forward + update.kept_in_forward * gradients
    if update.has_backward:
        product = max(
            _num_bytes([to_local(parameter.detach())]) for parameter in trainable
        )  # of two gradients, in turn
        of_update = max(of_update, weights + gradients + product)
        update_peak = max(update_peak, of_update + update.kept_in_backward * gradients)
    memory = Memory(
        parameters=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=training_peak - weights - gradients,
        mixture=max(0, update_peak - training_peak),
    )
    return memory, Size(parameters, trained, saved + whole_state)


def _forward_bytes(model: TokenLosses, live: LiveBytes, shape: Shape) -> int:
    """What forwards alone take at the most, besides the weights."""
    with torch.no_grad(), live.measured() as measured:
        model(*_batch(shape, live))
    return measured.peak


def _backward_bytes(model: TokenLosses, live: LiveBytes, shape: Shape) -> int:
    """All that there is at the most while a step computes its gradients, the optimizer's state left out.

    In the second of several micro-batches the gradients are there, and so are the casts that autocast keeps.
    """
    with model.autocast():
        for _ in range(2 if shape.several else 1):
            with live.measured() as measured:
                model(*_batch(shape, live)).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return measured.start + measured.peak


def _batch(shape: Shape, live: LiveBytes) -> tuple[Tensor, Tensor]:
    live.shape = shape
    tokens = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
    return tokens, tokens.clone()


def _optimizer_bytes(config: Any, parameters: Sequence[nn.Parameter], live: LiveBytes) -> tuple[int, int]:
    """The state of the config's optimizer for these parameters, and what a step takes besides at the most."""
    optimizer = config.optimizer.build(params=parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
        with live.measured() as measured:
            optimizer.step()
    except Exception as error:  # whatever an optimizer does with values that are not there
        raise ValueError(
            f"optimizer: the memory of {config.optimizer.component} cannot be reckoned: it needs values to step "
            f"({type(error).__name__})"
        ) from error
    finally:
        for parameter in parameters:
            parameter.grad = None
    states = [value for state in optimizer.state.values() for value in state.values()]
    return _num_bytes(value for value in states if isinstance(value, Tensor)), measured.peak


def _num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextlib.contextmanager
def _old_objects_aside() -> Iterator[None]:
    """What is there already is not looked through at every collection, which takes as long as all the rest."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _group(num_processes: int) -> Iterator[Any]:
    """The mesh of a process group of which this process is the first and the others are not there."""
    if num_processes == 1:
        yield None
        return
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 (registers the backend)

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=num_processes)
    try:
        yield init_device_mesh("cpu", (num_processes,))
    finally:
        dist.destroy_process_group()


@dataclass
class Measured:
    """Bytes that lived at the start of a block, and how many more at the most until its end."""

    start: int
    peak: int = 0


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live, each memory once however many views it has.

    Args:
        without_values: of fake tensors. What values would decide is decided here: a mask over the whole batch has
            ``shape``'s supervised positions, and every number read from a tensor is 1.
    """

    def __init__(self, *, without_values: bool = False) -> None:
        super().__init__()
        self.now = 0
        self.shape: Shape | None = None
        self._without_values = without_values
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self._measured = Measured(0)

    @contextlib.contextmanager
    def measured(self) -> Iterator[Measured]:
        gc.collect()  # what only a cycle keeps would not be there in a long run
        measured = self._measured = Measured(self.now)
        yield measured
        self._measured = Measured(self.now)

    def __enter__(self) -> LiveBytes:
        # FSDP2 frees what it has gathered by making its memory empty, which is no operation on tensors.
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
        if DTensor in types:
            return NotImplemented  # its shards come by next
        aten = torch.ops.aten
        if self._without_values:
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
        """The same, with a mask as the positions where it is true."""
        for index in indices:
            if index is None or index.dtype != torch.bool:
                yield index
            else:
                is_of_batch = self.shape is not None and index.shape == self.shape[:2]
                count = self.shape.supervised if self.shape and is_of_batch else index.numel()
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
