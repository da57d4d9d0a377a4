"""What the user sees: one file a node, and the single list of all nodes."""

from __future__ import annotations

from typing import Any

from .clear_cache import BladeClearCache
from .controlnet_apply import BladeControlNetApply
from .fused_lora import BladeFusedLoRA
from .optimize_model import BladeOptimizeModel
from .optimize_vae import BladeOptimizeVAE
from .report import BladeReport
from .routes import register_routes
from .warm_up import BladeWarmUp

ALL_NODES: tuple[Any, ...] = (
    BladeOptimizeModel,
    BladeFusedLoRA,
    BladeControlNetApply,
    BladeOptimizeVAE,
    BladeReport,
    BladeWarmUp,
    BladeClearCache,
)

# A node's id is its class name; workflows refer to it, so it never changes.
NODE_CLASS_MAPPINGS = {node.__name__: node for node in ALL_NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: node.TITLE for node in ALL_NODES}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "register_routes"]
