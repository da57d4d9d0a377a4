"""The nodes that put LoRAs on a model: stock's and Blade's."""

import importlib
from collections.abc import Sequence
from typing import Any

Stack = Sequence[tuple[str, float]]
"""Names of LoRA files with their strengths, in the order of a graph's rows."""

_ROWS = 8
"""LoRAs of one BladeFusedLoRA."""


class LoraLoaders:
    """Stock's nodes in a chain: one for each row, each keeping the file that it read last."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []

    def __call__(self, model: Any, stack: Stack) -> Any:
        """`model` with the stack's LoRAs."""
        while len(self._nodes) < len(stack):
            # The host's module, by name: to a type checker `nodes` is this pack's own folder.
            self._nodes.append(importlib.import_module("nodes").LoraLoader())
        for node, (name, strength) in zip(self._nodes, stack, strict=False):
            model, _ = node.load_lora(model, None, name, strength, 0.0)
        return model


class FusedLoras:
    """Blade's nodes: one for each eight rows; what does not fit raises."""

    def __call__(self, model: Any, stack: Stack) -> Any:
        """`model` with the stack's LoRAs."""
        from blade.nodes.fused_lora import BladeFusedLoRA

        before = None
        for start in range(0, len(stack), _ROWS):
            rows: dict[str, Any] = {}
            for row, (name, strength) in enumerate(stack[start : start + _ROWS], 1):
                rows |= {f"lora_{row}": name, f"strength_model_{row}": strength}
            model, _, before = BladeFusedLoRA().fuse(
                model, on_failure="error", lora_stack=before, **rows
            )
        return model
