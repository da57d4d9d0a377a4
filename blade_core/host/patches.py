"""Which blocks a call's patches touch, decided in plain Python before anything compiled runs.

What a patch may change is read off its name; a name that Blade does not know may change
anything, so then every block runs as stock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

BlockId = tuple[str, int]
"""The host's name of a block: ("input", 4), ("middle", 0), ("output", 11)."""

# Called by UNetModel._forward between the blocks (ComfyUI openaimodel.py), or only by other
# kinds of model: they change what a block is given, not what it computes.
_OUTSIDE = frozenset(
    {
        "input_block_patch",
        "input_block_patch_after_skip",
        "output_block_patch",
        "middle_block_after_patch",
        "emb_patch",
        "double_block",
        "single_block",
        "post_input",
        "noise_refiner",
    }
)
# Called inside BasicTransformerBlock.forward (ComfyUI attention.py).
_IN_TRANSFORMERS = frozenset(
    {"attn1_patch", "attn1_output_patch", "attn2_patch", "attn2_output_patch", "middle_patch"}
)
_LAYER = "forward_timestep_embed_patch"
_REPLACED = frozenset({"attn1", "attn2"})


@dataclass
class Patched:
    """Reasons why blocks cannot run compiled in this call, or the call not be captured whole.

    between: code of others runs between the blocks.
    """

    between: str | None = None
    everything: str | None = None
    transformers: str | None = None
    blocks: dict[BlockId, str] = field(default_factory=dict)
    layers: tuple[type[nn.Module], ...] = ()

    def anything(self) -> str | None:
        """Why this call is not the same as one without patches, or None."""
        if self.layers:
            return f"a {_LAYER} is set"
        return (
            self.between
            or self.everything
            or self.transformers
            or next(iter(self.blocks.values()), None)
        )

    def reason(self, block_id: BlockId, block: nn.Module, *, attends: bool) -> str | None:
        """Why `block` has to run as stock, or None. `attends`: it holds transformers."""
        if self.everything is not None:
            return self.everything
        if attends and self.transformers is not None:
            return self.transformers
        if block_id in self.blocks:
            return self.blocks[block_id]
        if self.layers and any(isinstance(layer, self.layers) for layer in block.children()):
            return f"a {_LAYER} matches one of its layers"
        return None


UNPATCHED = Patched()


def read_patches(transformer_options: dict[str, Any]) -> Patched:
    """Return what the patches of one call touch; UNPATCHED itself where there are none."""
    patches = transformer_options.get("patches")
    replaced = transformer_options.get("patches_replace")
    override = transformer_options.get("optimized_attention_override")
    if not patches and not replaced and override is None:
        return UNPATCHED
    found = Patched()
    if override is not None:
        found.transformers = "optimized_attention_override is set"
    for name, handlers in (patches or {}).items():
        if not handlers:
            continue
        if name in _OUTSIDE:
            found.between = f"{name} is set"
            continue
        if name == _LAYER:
            found.layers = tuple(kind for kind, _ in handlers)
        elif name in _IN_TRANSFORMERS:
            found.transformers = f"{name} is set"
        else:
            found.everything = f"Blade does not know the patch {name!r}"
    for name, by_block in (replaced or {}).items():
        if not by_block or name == "dit":
            continue
        if name not in _REPLACED:
            found.everything = f"Blade does not know the replacement patch {name!r}"
            continue
        for block in by_block:
            # A key is (name, number) or (name, number, index of the transformer in the block).
            found.blocks[tuple(block[:2])] = f"{name} is replaced by a patch"
    return found
