"""The node BladeReport."""

from __future__ import annotations

import json
from typing import Any

from ..blade_core.host.model import stats
from ..blade_core.report import as_text


class _Any(str):
    """A type that every output may be wired to."""

    def __ne__(self, other: object) -> bool:
        return False


class BladeReport:
    """What Blade did with a model, as text and as JSON."""

    TITLE = "Blade Report"
    CATEGORY = "Blade"
    DESCRIPTION = (
        "Shows what Blade did: each block compiled or not and why, graphs, cache hits and misses, "
        "seconds spent compiling. Wire text to a preview node (Preview Any) to read it; the same "
        "data is served at GET /blade/stats."
    )
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("text", "json")
    OUTPUT_TOOLTIPS = ("The report for reading.", "The report for programs.")
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that the report is about."}),
            },
            "optional": {
                "after": (
                    _Any("*"),
                    {
                        "tooltip": "Anything that has to be done first: wire the sampler's latent "
                        "or the image here, so that the report tells of that run."
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")  # never equal to itself: the report is made anew for each prompt

    def report(self, model: Any, after: Any = None) -> dict[str, Any]:
        data = stats(model)
        text = as_text(data)
        return {"ui": {"text": [text]}, "result": (text, json.dumps(data))}
