"""The node BladeOptimizeVAE."""

from __future__ import annotations

from typing import Any

from ..blade_core.config import OptimizeConfig
from ..blade_core.host.optimize_vae import optimize_vae, stock_vae
from .ahead import GetsReady
from .optimize_model import DIALS


class BladeOptimizeVAE(GetsReady):
    """VAE -> VAE, every layer of its encoder and decoder compiled."""

    TITLE = "Blade Optimize VAE"
    CATEGORY = "Blade"
    DESCRIPTION = (
        "Compiles the layers of an SD1.5 or SDXL VAE, for decoding and encoding, tiled too. The "
        "first image of a new size takes longer; batches, seeds and other VAEs of the same "
        "architecture compile nothing again."
    )
    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The same VAE; its encoder and decoder run compiled.",)
    FUNCTION = "optimize"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vae": (
                    "VAE",
                    {
                        "tooltip": "An SD1.5 or SDXL VAE. Other kinds, such as TAESD and those of "
                        "video models, pass through unchanged."
                    },
                ),
                **DIALS,
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def optimize(
        self,
        vae: Any,
        backend: str,
        freeze_weights: bool,
        on_failure: str,
        enabled: bool,
        unique_id: str | None = None,
    ) -> tuple[Any]:
        config = OptimizeConfig(
            backend=backend, freeze_weights=freeze_weights, on_failure=on_failure
        )
        if not enabled:
            return (stock_vae(vae),)
        return (optimize_vae(vae, config, node_id=unique_id),)
