"""LoRAs that only add to a weight, as parts that can be summed, and the one patch of their sum.

A part is a tuple (kind, scale, tensors), nothing else: hosts with dynamic VRAM take a patch
apart into its tensors, move them, and build it again from tuples.
Source of the kinds' meaning: comfy/weight_adapter and comfy/lora.py (calculate_weight).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import comfy.weight_adapter
import torch
from comfy.weight_adapter.base import WeightAdapterBase

from ..log import logger

LOW_RANK = "lora"
DIFF = "diff"

Part = tuple[str, float, tuple[Any, ...]]
"""kind, scale, tensors. Of LOW_RANK: up (out, rank) and down (rank, in). Of DIFF: one of the
weight's shape. Of other kinds: what the host's adapter of that name holds."""

_HOSTS_OWN = {
    kind.name: kind for kind in (comfy.weight_adapter.LoHaAdapter, comfy.weight_adapter.LoKrAdapter)
}


def part_of(patch: Any) -> Part | None:
    """The host's `patch` as a part of scale 1, or None if it does more than add a multiple."""
    if type(patch) is comfy.weight_adapter.LoRAAdapter:
        return _low_rank(*patch.weights)
    if type(patch) in _HOSTS_OWN.values():
        # The last of these tensors is DoRA's scale, which divides by the weight's own norm.
        return None if patch.weights[-1] is not None else (patch.name, 1.0, tuple(patch.weights))
    if isinstance(patch, tuple):
        tensors = patch[1] if len(patch) == 2 and patch[0] == "diff" else patch
        if len(tensors) == 1 and isinstance(tensors[0], torch.Tensor):
            return DIFF, 1.0, tuple(tensors)
    return None


def _low_rank(up: Any, down: Any, alpha: Any, mid: Any, dora: Any, reshape: Any) -> Part | None:
    if dora is not None or reshape is not None or up.ndim < 2 or down.ndim < 2:
        return None
    rank = down.shape[0]
    if mid is not None:  # LoCon's core, multiplied into the lower factor
        if mid.ndim != 4 or mid.shape[:2] != (rank, rank):
            return None
        lower = torch.mm(
            down.float().transpose(0, 1).flatten(1), mid.float().transpose(0, 1).flatten(1)
        )
        down = lower.reshape(down.shape[1], rank, *mid.shape[2:]).transpose(0, 1).contiguous()
    scale = 1.0 if alpha is None else alpha / rank
    return LOW_RANK, scale, (up.flatten(1), down.flatten(1))


def scaled(part: Part, factor: float) -> Part:
    kind, scale, tensors = part
    return kind, scale * factor, tensors


def tensors_of(part: Part) -> list[torch.Tensor]:
    return [t for t in part[2] if isinstance(t, torch.Tensor)]


def with_tensors(part: Part, change: Callable[[torch.Tensor], torch.Tensor]) -> Part:
    """`part` with `change` of each of its tensors."""
    kind, scale, tensors = part
    return kind, scale, tuple(change(t) if isinstance(t, torch.Tensor) else t for t in tensors)


def fits(part: Part, shape: Sequence[int]) -> bool:
    """Whether a weight of `shape` has as many elements as the part gives, as the host asks."""
    kind, _, tensors = part
    count = torch.Size(shape).numel()
    if kind == DIFF:
        return tensors[0].shape == torch.Size(shape)
    if kind == LOW_RANK:
        up, down = tensors
        return up.shape[1] == down.shape[0] and up.shape[0] * down.shape[1] == count
    if (_loha_size(*tensors) if kind == "loha" else _lokr_size(*tensors)) != count:
        return False
    shapes = tuple(t.shape if isinstance(t, torch.Tensor) else None for t in tensors)
    return _fit_each_other(kind, shapes, torch.Size(shape))


@functools.lru_cache(4096)  # a switch asks for hundreds of weights, most of them alike
def _fit_each_other(kind: str, shapes: tuple[torch.Size | None, ...], shape: torch.Size) -> bool:
    """Whether factors of these shapes, and none where it is None, give a weight of `shape`."""
    factors = tuple(s if s is None else torch.empty(s, device="meta") for s in shapes)
    try:
        add_parts(torch.empty(shape, device="meta"), [(kind, 1.0, factors)])
    except (RuntimeError, IndexError):
        return False
    return True


def _loha_size(up: Any, down: Any, _: Any, __: Any, ___: Any, core: Any, *____: Any) -> int:
    if core is None:
        return int(up.shape[0] * down.shape[-1])
    return int(up.shape[-1] * down.shape[-1] * core.shape[2:].numel())


def _lokr_size(
    one: Any, two: Any, _: Any, up1: Any, down1: Any, up2: Any, down2: Any, core: Any, __: Any
) -> int:
    first = up1.shape[0] * down1.shape[-1] if one is None else one.numel()
    if two is not None:
        return int(first * two.numel())
    if core is None:
        return int(first * up2.shape[0] * down2.flatten(1).shape[1])
    return int(first * up2.shape[-1] * down2.shape[-1] * core.shape[2:].numel())


def add_parts(total: torch.Tensor, parts: Sequence[Part]) -> None:
    """Add all `parts` to `total`, in fp32 as it is itself."""
    device = total.device

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device).float()  # moved as it is: a CPU would convert slowly

    low_rank: dict[int, list[Part]] = {}
    for part in parts:
        kind, scale, tensors = part
        if kind == LOW_RANK:
            low_rank.setdefault(tensors[0].shape[0], []).append(part)
        elif kind == DIFF:
            total.add_(there(tensors[0]).view(total.shape), alpha=scale)
        else:
            adapter = _HOSTS_OWN[kind](set(), tensors)
            adapter.calculate_weight(total, kind, scale, 1.0, None, _same, torch.float32)
    for rows, members in low_rank.items():
        ups = torch.cat([there(up) * scale for _, scale, (up, _) in members], dim=1)
        downs = torch.cat([there(down) for _, _, (_, down) in members])
        total.view(rows, -1).addmm_(ups, downs)


def _same(delta: torch.Tensor) -> torch.Tensor:
    return delta


class FusedDelta(WeightAdapterBase):
    """The patch of a weight that holds the sum of many. `weights` are its parts.

    Strengths are in the parts' scales already. The sum is made where the weight is, in fp32.
    """

    name = "blade_fused"

    def __init__(self, loaded_keys: set[str], weights: Sequence[Part]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[torch.Tensor], torch.Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> torch.Tensor:
        """Add the sum to `weight` in place and return it: the host's contract."""
        total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        parts = [part for part in self.weights if fits(part, weight.shape)]
        if len(parts) < len(self.weights):  # another patch has made the weight larger
            logger.error("LoRAs do not fit %s of shape %s any more.", key, tuple(weight.shape))
        add_parts(total, parts)
        if strength != 1.0:
            total *= strength
        weight.copy_(weight.float() + function(total))
        return weight


def parts_of(patches: Sequence[tuple[Any, ...]]) -> list[Part] | None:
    """All patches of a weight as parts with their strengths; None if one is no mere sum.

    patches: the host's (strength, patch, strength of the weight, offset, function).
    """
    found: list[Part] = []
    for strength, patch, strength_model, offset, function in patches:
        if strength_model != 1.0 or offset is not None or function is not None:
            return None
        parts = _parts(patch)
        if parts is None:
            return None
        found += parts if strength == 1.0 else [scaled(part, strength) for part in parts]
    return found


def _parts(patch: Any) -> Sequence[Part] | None:
    if type(patch) is FusedDelta:
        return patch.weights
    part = part_of(patch)
    return None if part is None else [part]
