"""The node BladeClearCache."""

from __future__ import annotations

from typing import Any

from ..blade_core.host.model import session


class BladeClearCache:
    """Deletes compiled graphs."""

    TITLE = "Blade Clear Cache"
    CATEGORY = "Blade"
    DESCRIPTION = (
        "Deletes Blade's compiled graphs; what is needed is compiled again. Nothing else is "
        "touched: no model, no image, no file of other packs."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("text",)
    OUTPUT_TOOLTIPS = ("What was deleted.",)
    FUNCTION = "clear"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "disk": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Graphs on disk, which a restarted ComfyUI would load. Costs "
                        "compiling again after the next restart.",
                    },
                ),
                "memory": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Graphs and CUDA graphs of this ComfyUI. Costs compiling again "
                        "with the next image, unless they are on disk.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")  # never equal to itself: whoever queues it wants it done

    def clear(self, disk: bool, memory: bool) -> dict[str, Any]:
        text = "\n".join(session().clear(disk=disk, memory=memory)) or "Nothing was to be deleted."
        return {"ui": {"text": [text]}, "result": (text,)}
