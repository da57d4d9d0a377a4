"""The node BladeWarmUp."""

from __future__ import annotations

from typing import Any

from ..blade_core.host.warm_up import read_batches, read_sizes, warm_up


class BladeWarmUp:
    """Compiles given sizes and batch sizes ahead of the prompts that need them."""

    TITLE = "Blade Warm Up"
    CATEGORY = "Blade"
    DESCRIPTION = (
        "Gets the model ready for sizes and batch sizes before you need them, by a few steps of "
        "each, and waits until all is compiled. Runs again only if something that is wired to it "
        "changes."
    )
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "text")
    OUTPUT_TOOLTIPS = ("The same model.", "What was compiled or loaded, and how long it took.")
    FUNCTION = "warm_up"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prompt = (
            "As in your KSampler: its length in tokens counts, its words do not. "
            "ControlNets on it are warmed up too."
        )
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A model behind Blade Optimize Model."}),
                "positive": ("CONDITIONING", {"tooltip": prompt}),
                "negative": ("CONDITIONING", {"tooltip": prompt}),
                "sizes": (
                    "STRING",
                    {
                        "default": "512x512, 768x512",
                        "tooltip": "Images' sizes in pixels, WIDTHxHEIGHT with commas between. "
                        "Each costs as long as its first image would.",
                    },
                ),
                "batch_sizes": (
                    "STRING",
                    {"default": "1", "tooltip": "Images at once, with commas between: 1, 4."},
                ),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 7.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.1,
                        "tooltip": "As in your KSampler. What counts is whether it is 1: then the "
                        "negative prompt is left out, and the batch is half as large.",
                    },
                ),
            },
        }

    def warm_up(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        sizes: str,
        batch_sizes: str,
        cfg: float,
    ) -> dict[str, Any]:
        lines = warm_up(
            model, positive, negative, read_sizes(sizes), read_batches(batch_sizes), cfg
        )
        text = "\n".join(lines)
        return {"ui": {"text": [text]}, "result": (model, text)}
