"""The node BladeFusedLoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..blade_core.config import ON_FAILURE
from ..blade_core.host import model as host
from ..blade_core.host.fuse import Row, fuse_loras
from ..blade_core.host.lora_file import lora_names, lora_versions

ROWS = 8


class BladeFusedLoRA:
    """MODEL, CLIP -> MODEL, CLIP with any number of LoRAs, fused into the weights."""

    TITLE = "Blade Fused LoRA"
    CATEGORY = "Blade"
    DESCRIPTION = (
        "Applies up to eight LoRAs, and any number in a lora_stack, as one change of the weights: "
        "a step takes as long as without any, nothing compiles again, and a switch of files or "
        "strengths takes milliseconds. Goes before or after Blade Optimize Model, works without "
        "it, and mixes with Load LoRA."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "LORA_STACK")
    RETURN_NAMES = ("model", "clip", "lora_stack")
    OUTPUT_TOOLTIPS = (
        "The model with all LoRAs.",
        "The text encoder with all LoRAs; nothing if none was wired.",
        "All LoRAs that this node applied, for another stack node.",
    )
    FUNCTION = "fuse"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for number in range(1, ROWS + 1):
            rows |= _row_inputs(number, ["None", *lora_names()])
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that gets the LoRAs."}),
                "on_failure": (
                    list(ON_FAILURE),
                    {
                        "default": "fallback",
                        "tooltip": "What happens when part of a file cannot be used (NaN values, "
                        "other shapes). fallback: the rest is applied and the log names what was "
                        "left out. error: the prompt stops. A file of which nothing fits always "
                        "stops it. Typical: fallback.",
                    },
                ),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "The text encoder that gets the LoRAs, too."}),
                "lora_stack": (
                    "LORA_STACK",
                    {
                        "tooltip": "LoRAs from another stack node, applied before these rows. If "
                        "model comes from the same node as the stack, it has them already and "
                        "they are not applied again."
                    },
                ),
                **rows,
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        # Only what is written in the node is known here; what is wired comes as None.
        names = [inputs.get(f"lora_{number}") for number in range(1, ROWS + 1)]
        return repr(lora_versions([name for name in names if isinstance(name, str)]))

    def fuse(
        self,
        model: Any,
        on_failure: str = "fallback",
        clip: Any = None,
        lora_stack: Any = None,
        unique_id: str | None = None,
        **rows: Any,
    ) -> tuple[Any, Any, list[tuple[str, float, float]]]:
        stack = Row.of_stack(lora_stack)
        own = list(_rows(rows))
        library = host.session().loras
        model, clip = fuse_loras(
            library, model, clip, stack, own, on_failure=on_failure, node_id=unique_id
        )
        return model, clip, [row.stack_entry for row in (*stack, *own)]


def _row_inputs(number: int, names: list[str]) -> dict[str, Any]:
    strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
    return {
        f"lora_{number}": (names, {"default": "None", "tooltip": "A LoRA file, or None."}),
        f"strength_model_{number}": (
            "FLOAT",
            {**strength, "tooltip": "How strongly the model is changed; may be negative."},
        ),
        f"strength_clip_{number}": (
            "FLOAT",
            {**strength, "tooltip": "How strongly the text encoder is changed."},
        ),
        f"enabled_{number}": ("BOOLEAN", {"default": True, "tooltip": "Off: as if not there."}),
    }


def _rows(inputs: dict[str, Any]) -> Iterator[Row]:
    """The rows in use; what a workflow leaves out has its default."""
    for number in range(1, ROWS + 1):
        name = str(inputs.get(f"lora_{number}") or "None")
        row = Row(
            name,
            float(inputs.get(f"strength_model_{number}", 1.0)),
            float(inputs.get(f"strength_clip_{number}", 1.0)),
        )
        if row.active and inputs.get(f"enabled_{number}", True):
            yield row
