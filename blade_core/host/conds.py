"""Prompts where the model is, for the length of a run.

The host keeps them in main memory, and joins and copies them in every step: work for all of the
processor's threads, whose waking up alone was seen to take longer than a step.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.conds import CONDCrossAttn, CONDNoiseShape, CONDRegular

_KINDS = (CONDRegular, CONDCrossAttn, CONDNoiseShape)


def to_device(conds: dict[str, Any], device: torch.device) -> None:
    """Give a guider's `conds`, which are a run's own, tensors on `device`.

    conds: "positive", "negative" and others, each a list of dicts, as the host's process_conds
        leaves them. Prompts, and whoever else holds their tensors, keep them as they are.
    """
    if device.type == "cpu":
        return
    for name, each in conds.items():
        if isinstance(each, list):
            conds[name] = [_moved(cond, device) for cond in each]


def _moved(cond: Any, device: torch.device) -> Any:
    held = cond.get("model_conds") if isinstance(cond, dict) else None
    if not isinstance(held, dict):
        return cond
    return {**cond, "model_conds": {key: _one(value, device) for key, value in held.items()}}


def _one(value: Any, device: torch.device) -> Any:
    tensor = getattr(value, "cond", None)
    if type(value) not in _KINDS or not isinstance(tensor, torch.Tensor):
        return value
    return value if tensor.device == device else value._copy_with(tensor.to(device))
