"""Which GPU a tensor is on: some kernels pay on those only that they were measured on."""

from __future__ import annotations

from functools import lru_cache

import torch

HOPPER = (9, 0)


def is_hopper(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is on a GPU of the H100's and H200's kind."""
    return tensor.is_cuda and _capability(tensor.device) == HOPPER


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
