"""BladeControlNetApply's work: a ControlNet that runs through Blade, as a copy of the host's.

The host copies a CONTROL_NET at each node and asks the copy for residuals at each step, which
calls its model. Here the model is a proxy that calls Blade; everything else is the host's own
code. What came in stays as it was, for whoever else uses it.
"""

from __future__ import annotations

import importlib
from typing import Any

import comfy.model_management
import torch
from comfy.cldm.cldm import ControlNet as ControlModel
from comfy.controlnet import ControlBase, ControlLora, ControlNet, T2IAdapter

from ..config import OptimizeConfig
from ..errors import ControlNetError
from ..log import logger
from . import model as host
from .compiled_control import CompiledControlNet, compiled
from .control_lora import FusedControlLora
from .control_proxy import Proxy
from .dynamic import non_dynamic_control_model
from .progress import say

Conditioning = list[list[Any]]
"""The host's CONDITIONING: [[prompt, options], ...]."""


def optimize_controlnet(
    control: ControlBase, config: OptimizeConfig, *, node_id: str | None = None
) -> ControlBase:
    """Return a copy of `control` that runs compiled, or `control` itself with a message.

    Raises:
        BackendUnavailable: `on_failure` is `error` and the backend cannot run here.
    """
    reason = _why_not(control)
    if reason is not None:
        message = f"This ControlNet runs as stock: {reason}."
        logger.info(message)
        say(message, node_id)
        return control
    if config.strict:
        host.session().engine.backends(config, comfy.model_management.get_torch_device())
    if isinstance(control, ControlLora):
        return FusedControlLora.of(control, config, node_id)
    model, patcher = non_dynamic_control_model(control)
    result = compiled(control.copy())
    result.control_model = Proxy(model, config, node_id)
    result.control_model_wrapped = patcher
    return result


def _why_not(control: Any) -> str | None:
    kind = type(control)
    if kind is ControlLora:
        return None
    if kind is T2IAdapter:
        return "ComfyUI itself computes the features of a T2I-Adapter once a run"
    if kind is not ControlNet:
        return f"Blade does not know {kind.__module__}.{kind.__name__}"
    if type(control.control_model) is not ControlModel:
        return f"it holds a {type(control.control_model).__name__}, not an SD1.5 or SDXL ControlNet"
    return None


def apply_controlnet(
    positive: Conditioning,
    negative: Conditioning,
    control: ControlBase,
    image: torch.Tensor,
    strength: float,
    start_percent: float,
    end_percent: float,
    vae: Any = None,
) -> tuple[Conditioning, Conditioning]:
    """What the host's ControlNetApplyAdvanced does, by its own code.

    image: (B, H, W, C), values in 0..1.
    """
    # The host's module, by name: here `nodes` is this pack's own folder.
    node = importlib.import_module("nodes").ControlNetApplyAdvanced()
    result: tuple[Conditioning, Conditioning] = node.apply_controlnet(
        positive, negative, control, image, strength, start_percent, end_percent, vae
    )
    return result


def check_image(control: ControlBase, image: Any) -> None:
    """Refuse what cannot be a control image for `control`.

    Raises:
        ControlNetError: naming what was seen and what is expected.
    """
    if not isinstance(image, torch.Tensor) or image.ndim != 4:
        raise ControlNetError(
            f"The control image is {_form(image)}; expected an IMAGE, (batch, height, width, "
            "channels). Wire an image into it, such as that of Load Image."
        )
    channels = _hint_channels(control)
    if channels is not None and image.shape[3] != channels:
        raise ControlNetError(
            f"The control image has {image.shape[3]} channels; this ControlNet expects {channels}. "
            "Convert the image: an alpha channel goes with Split Image with Alpha."
        )
    if not torch.isfinite(image).all():
        raise ControlNetError(
            "The control image holds NaN or infinite values; the result would be black. Look at "
            "the node that it comes from, often a preprocessor or a VAE in half precision."
        )


def _form(image: Any) -> str:
    return f"of shape {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__


def _hint_channels(control: Any) -> int | None:
    """How many channels `control` takes, where Blade knows its kind."""
    if isinstance(control, FusedControlLora):
        return control.hint_channels
    if isinstance(control, CompiledControlNet):
        channels: int = control.control_model.input_hint_block[0].in_channels
        return channels
    return None
