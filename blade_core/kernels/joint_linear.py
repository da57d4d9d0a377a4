"""Linear layers over the same tokens as one product: Q, K and V of self-attention.

A product of few rows fills a GPU with programs once or twice, and its last round leaves a part of
it idle. One product of three times the columns has one such round instead of three. It is torch's
own product, over weights that lie one behind the other (host/joined.py sees to that); over others,
there are as many products as there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from .launch import opaque

VERSION = 1
"""Counts changes of the operator. Compiled graphs that are kept are of one version."""


def reference(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The eager twin, by torch's own operations.

    Args:
        x: (M, K).
        weights: (N_i, K) each.

    Returns:
        (M, sum of N_i): what each layer gives, one beside the other.
    """
    return torch.cat([functional.linear(x, weight) for weight in weights], -1)


def usable(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """Whether `joint_linear` can take the place of several layers."""
    return (
        len(weights) > 1
        and x.ndim == 2
        and x.is_floating_point()
        and all(w.ndim == 2 and w.is_contiguous() and w.dtype == x.dtype for w in weights)
        and all(w.shape[1] == x.shape[1] and w.shape[0] % 8 == 0 for w in weights)  # 16 bytes
    )


def joint_linear(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """The same, with one product if the weights lie one behind the other."""
    whole = as_one(weights)
    if whole is not None:
        return torch.mm(x, whole.t())
    columns = [weight.shape[0] for weight in weights]
    out = x.new_empty((x.shape[0], sum(columns)))
    for part, weight in zip(out.split(columns, 1), weights, strict=True):
        torch.mm(x, weight.t(), out=part)
    return out


def as_one(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """(sum of N_i, K): a view of contiguous weights, if they lie one behind the other."""
    first = weights[0]
    storage, place = first.untyped_storage().data_ptr(), first.storage_offset()
    for weight in weights:
        if weight.storage_offset() != place or weight.untyped_storage().data_ptr() != storage:
            return None
        place += weight.numel()
    rows = sum(weight.shape[0] for weight in weights)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _form(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    return x.new_empty((x.shape[0], sum(weight.shape[0] for weight in weights)))


def operator() -> Any:
    """`joint_linear` as an operator of torch."""
    return opaque(joint_linear, _form, "(Tensor x, Tensor[] weights) -> Tensor", VERSION)
