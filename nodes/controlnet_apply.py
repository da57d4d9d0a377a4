"""The node BladeControlNetApply."""

from __future__ import annotations

from typing import Any

from ..blade_core.config import OptimizeConfig
from ..blade_core.host.controlnet import (
    apply_controlnet,
    check_image,
    optimize_controlnet,
)
from .optimize_model import COMPILE_DIAL, DIALS, FROZEN_DIAL


class BladeControlNetApply:
    """ControlNetApplyAdvanced, with the ControlNet's blocks compiled."""

    TITLE = "Blade Apply ControlNet"
    CATEGORY = "Blade"
    DESCRIPTION = (
        "Apply ControlNet with the ControlNet's blocks compiled, and the control image taken up "
        "once an image instead of once a step. SD1.5 and SDXL ControlNets, Union ControlNets and "
        "Control LoRAs; another ControlNet, image, strength, start or end compiles nothing. Other "
        "kinds run as with ComfyUI's own node."
    )
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    OUTPUT_TOOLTIPS = (
        "The positive prompt, with the ControlNet on it.",
        "The negative prompt, with the ControlNet on it.",
    )
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "positive": ("CONDITIONING", {"tooltip": "The positive prompt."}),
                "negative": ("CONDITIONING", {"tooltip": "The negative prompt."}),
                "control_net": (
                    "CONTROL_NET",
                    {"tooltip": "A ControlNet that was made for the model's architecture."},
                ),
                "image": (
                    "IMAGE",
                    {"tooltip": "The control image: edges, depth, a pose. It is scaled to fit."},
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 10.0,
                        "step": 0.01,
                        "tooltip": "How much the control image counts. 0: not at all, and no step "
                        "takes longer. Typical: 0.5 to 1.",
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.001,
                        "tooltip": "From which part of the sampling on it counts. Typical: 0.",
                    },
                ),
                "end_percent": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.001,
                        "tooltip": "Up to which part of the sampling it counts; steps after that "
                        "are as fast as without. Typical: 0.5 to 1.",
                    },
                ),
            },
            # Optional, so that a workflow posted for the stock node needs no more than this id.
            "optional": {
                "vae": (
                    "VAE",
                    {
                        "tooltip": "For ControlNets that work on latents (SD3, Flux); they run as "
                        "stock."
                    },
                ),
                **DIALS,
                "enabled": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Off: the ControlNet is applied by ComfyUI's own code. To leave "
                        "it out, set strength to 0.",
                    },
                ),
                **FROZEN_DIAL,
                **COMPILE_DIAL,
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def apply(
        self,
        positive: Any,
        negative: Any,
        control_net: Any,
        image: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        vae: Any = None,
        backend: str = "auto",
        freeze_weights: bool = False,
        on_failure: str = "fallback",
        enabled: bool = True,
        frozen_change: str = "rebuild",
        compile: str = "first",
        unique_id: str | None = None,
    ) -> tuple[Any, Any]:
        config = OptimizeConfig(
            backend=backend,
            freeze_weights=freeze_weights,
            on_failure=on_failure,
            frozen_change=frozen_change,
            compile=compile,
        )
        if enabled and strength != 0:
            control_net = optimize_controlnet(control_net, config, node_id=unique_id)
            check_image(control_net, image)
        return apply_controlnet(
            positive, negative, control_net, image, strength, start_percent, end_percent, vae
        )
