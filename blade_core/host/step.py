"""Which UNet calls can be one capture, and their tensors as one flat list.

A capture replays kernels and nothing else: whatever else would run in Python during the call,
another pack's wrapper or patch, would be skipped. So a call is looked at before each replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.diffusionmodules import openaimodel
from torch import nn

from ..key import digest
from ..structure import describe, modules_of
from .patches import Patched
from .weights import HOST_STATE

_HOST = {
    name: getattr(openaimodel, name)
    for name in ("forward_timestep_embed", "apply_control", "timestep_embedding")
}
_HOST_FORWARD = openaimodel.UNetModel._forward

Signature = tuple[Any, ...]


class Call(NamedTuple):
    """One call of a UNet: its tensors, and everything else about it that a capture bakes in."""

    tensors: list[torch.Tensor]
    signature: Signature

    def arguments(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The host's (x, timesteps, context, y, control) over other tensors."""
        rest = iter(tensors)
        plain, control = self.signature
        arguments: list[Any] = [None if spec is None else next(rest) for spec in plain]
        if control is not None:
            # New lists for each use: the host takes the residuals out of them as it goes.
            control = {
                name: [None if spec is None else next(rest) for spec in specs]
                for name, specs in control
            }
        return [*arguments, control]


def read_call(args: tuple[Any, ...]) -> Call | None:
    """Return the tensors of (x, timesteps, context, y, control), or None in an unknown form."""
    tensors: list[torch.Tensor] = []

    def spec(value: Any) -> Any:
        if value is None:
            return None
        tensors.append(value)
        return value.shape, value.dtype

    *plain, control = args[:5]
    try:
        plain_specs = tuple([spec(value) for value in plain])
        control_specs = None
        if control is not None:
            control_specs = tuple(
                [(name, tuple([spec(value) for value in control[name]])) for name in control]
            )
        device = args[0].device
        if any(tensor.device != device for tensor in tensors):
            return None
    except (AttributeError, TypeError):
        return None
    return Call(tensors, (plain_specs, control_specs))


def foreign_code(
    executor: Callable[..., Any], kwargs: dict[str, Any], patched: Patched
) -> str | None:
    """Why this call runs code of others that a replay would leave out, or None."""
    reason = patched.anything()
    if reason is not None:
        return reason
    if any(value is not None for value in kwargs.values()):
        return f"the host passes {', '.join(kwargs)}"
    wrappers, index = getattr(executor, "wrappers", None), getattr(executor, "idx", None)
    if wrappers is None or index is None or len(wrappers) > index + 1:
        return "another node's wrapper runs inside the call"
    original = getattr(executor.original, "__func__", None)  # type: ignore[attr-defined]
    if original is not _HOST_FORWARD or not original.__module__.startswith("comfy."):
        return "another node pack replaced the UNet's forward"
    return None


def replaced_by_others() -> str | None:
    """Name a function of the host's UNet that another pack has put its own in the place of."""
    for name, function in _HOST.items():
        now = getattr(openaimodel, name)
        if now is not function or not now.__module__.startswith("comfy."):
            return f"another node pack replaced ComfyUI's {name}"
    return None


def outer_modules(unet: nn.Module, containers: tuple[str, ...]) -> list[nn.Module]:
    """The layers that the host runs itself around the blocks."""
    return [
        module
        for name, child in unet.named_children()
        if name not in containers
        for module in modules_of(child)
    ]


def describe_outer(unet: nn.Module, containers: tuple[str, ...]) -> str:
    """What the host's own layers around the blocks compute, but for their weights.

    Raises:
        UnknownStructure: somebody put something there that cannot be described.
    """
    children = [child for name, child in unet.named_children() if name not in containers]
    return digest([describe(child, ignore=HOST_STATE) for child in children])


def not_capturable(modules: Iterable[nn.Module], device: torch.device) -> str | None:
    """Why the host's own run of these layers, outside of any graph, cannot be recorded."""
    for module in modules:
        kind = type(module).__name__
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a {kind} outside the graphs has hooks"
        if "forward" in vars(module):
            return f"a {kind} outside the graphs has a replaced forward"
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if tensor.device != device:
                return f"a {kind} outside the graphs is on {tensor.device}"
            if getattr(module, f"{key}_function", None) or hasattr(module, "_v"):
                return f"a {kind} outside the graphs is patched while it runs"
    return None
