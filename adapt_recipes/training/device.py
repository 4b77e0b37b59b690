"""The device of a run."""

from __future__ import annotations

import os

import torch
from torchtune import utils


def get_device(name: str | None) -> torch.device:
    """The device that a config asks for, made the current one; None: the best there is.

    Raises:
        ValueError: there is no such device on this machine (torchtune would take the CPU for ``cuda``), or torchrun has
            started several processes, each of which would train alone in the same ``output_dir``.
    """
    if (world_size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"--nproc_per_node: recipes run on one process as yet, not on {world_size}")
    try:
        device = utils.get_device(name)
        if name is not None and device.type != torch.device(name).type:
            raise RuntimeError("there is none on this machine")
    except (RuntimeError, AssertionError, AttributeError) as error:  # torch raises any of them
        raise ValueError(f"device: '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device
