"""The node BladeOptimizeModel."""

from __future__ import annotations

from typing import Any

from ..blade_core.config import BACKENDS, COMPILE, FROZEN_CHANGE, ON_FAILURE, OptimizeConfig
from ..blade_core.host.model import optimize_model, without_blade
from .ahead import GetsReady

DIALS: dict[str, Any] = {
    "backend": (
        list(BACKENDS),
        {
            "default": "auto",
            "tooltip": "The compiler. auto takes the first that can run here: "
            "torch_blade, then inductor. eager compiles nothing and gains nothing; "
            "it is for finding out where a difference comes from. Typical: auto.",
        },
    ),
    "freeze_weights": (
        "BOOLEAN",
        {
            "default": False,
            "tooltip": "Folds the weights into the compiled graphs. Costs a second "
            "copy of these weights in memory, and every change of LoRA, strength "
            "or checkpoint compiles again. Typical: off.",
        },
    ),
    "on_failure": (
        list(ON_FAILURE),
        {
            "default": "fallback",
            "tooltip": "What happens when something cannot be compiled. fallback: "
            "that block runs as without this node, and the report says why. error: "
            "the prompt stops with the reason. Typical: fallback.",
        },
    ),
    "enabled": (
        "BOOLEAN",
        {
            "default": True,
            "tooltip": "Off: everything runs exactly as without Blade. Costs nothing; handy for "
            "comparing.",
        },
    ),
}
"""What can be chosen wherever Blade compiles."""

FROZEN_DIAL: dict[str, Any] = {
    "frozen_change": (
        list(FROZEN_CHANGE),
        {
            "default": "rebuild",
            "tooltip": "With freeze_weights on, what happens when a LoRA, a strength "
            "or the checkpoint changes. rebuild: it compiles again, with a warning. "
            "refuse: the prompt stops and says so. Typical: rebuild.",
        },
    ),
}
"""With it, and optional: workflows from before it was there still run."""


COMPILE_DIAL: dict[str, Any] = {
    "compile": (
        list(COMPILE),
        {
            "default": "first",
            "tooltip": "What happens while graphs are missing. first: the first step of a new size "
            "waits for them. background: other processes compile, and sampling goes on as without "
            "Blade until they are done; costs their memory meanwhile, and the first image's "
            "rounding differs a little from later ones'. Typical: first.",
        },
    ),
}
"""Optional, for the same reason."""


class BladeOptimizeModel(GetsReady):
    """MODEL -> MODEL, every UNet block compiled."""

    TITLE = "Blade Optimize Model"
    CATEGORY = "Blade"
    DESCRIPTION = (
        "Compiles every block of an SD1.5 or SDXL UNet. The first image of a new size or batch "
        "takes longer; from then on steps are faster, and LoRAs, checkpoints of the same "
        "architecture, prompts, seeds and samplers can be switched without compiling again."
    )
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The same model; its UNet runs compiled.",)
    FUNCTION = "optimize"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    "MODEL",
                    {
                        "tooltip": "An SD1.5 or SDXL model. LoRA nodes may come before or after "
                        "this node. Other kinds of model pass through unchanged."
                    },
                ),
                **DIALS,
            },
            "optional": {
                **FROZEN_DIAL,
                **COMPILE_DIAL,
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def optimize(
        self,
        model: Any,
        backend: str,
        freeze_weights: bool,
        on_failure: str,
        enabled: bool,
        frozen_change: str = "rebuild",
        compile: str = "first",
        unique_id: str | None = None,
    ) -> tuple[Any]:
        config = OptimizeConfig(
            backend=backend,
            freeze_weights=freeze_weights,
            on_failure=on_failure,
            frozen_change=frozen_change,
            compile=compile,
        )
        if not enabled:
            return (without_blade(model),)
        return (optimize_model(model, config, node_id=unique_id),)
