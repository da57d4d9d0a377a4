"""Puts Blade's kernels into traced graphs where they fit, and leaves everything else.

A graph is what `graph.trace` gives: ATen operators, before any compiler has seen it. What is
looked at are the values that tracing has noted for each node (`meta["val"]`), no data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import fx
from torch.fx.operator_schemas import normalize_function

from . import flash_attention, geglu, group_norm, joint_linear, layer_norm, short_attention
from .joint_pass import join_linears
from .nodes import aten, calls, erase, only_result, only_user, value
from .token_passes import LATE_BIAS_VERSION, fuse_geglu, fuse_layer_norms, late_biases, pays_late

ATTENTIONS = (
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What torch makes of scaled_dot_product_attention, one or the other."""

KERNELS = {
    "joint_linear": joint_linear.VERSION,
    "group_norm": group_norm.VERSION,
    "short_attention": short_attention.VERSION,
    "flash_attention": flash_attention.VERSION,
    "geglu": geglu.VERSION,
    "layer_norm": layer_norm.VERSION,
    "late_bias": LATE_BIAS_VERSION,
}
"""Name and version of each kernel that can be asked for, and of what goes without one."""

OPAQUE = (joint_linear.operator,)
"""What registers those with torch that compiled graphs call by name."""

OPERATORS = (
    *OPAQUE,
    group_norm.operator,
    short_attention.operator,
    flash_attention.operator,
    geglu.operator,
    layer_norm.operators,
)
"""What registers all of them."""


def use_kernels(module: fx.GraphModule, kernels: Collection[str]) -> int:
    """Change `module` in place; return how many of its nodes are Blade's kernels now."""
    count = 0
    if "joint_linear" in kernels:
        count += join_linears(module.graph, joint_linear.usable)
    if "group_norm" in kernels:
        count += fuse_group_norms(module.graph, group_norm.usable)
    if "short_attention" in kernels:
        count += replace_attention(module.graph, short_attention)
    if "flash_attention" in kernels:
        count += replace_attention(module.graph, flash_attention)
    if "geglu" in kernels:
        count += fuse_geglu(module.graph, geglu.usable)
    if "layer_norm" in kernels:
        count += fuse_layer_norms(module.graph, layer_norm.usable)
    if "late_bias" in kernels:
        count += late_biases(module.graph, pays_late)
    if count:
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


def fuse_group_norms(graph: fx.Graph, usable: Callable[[torch.Tensor, int], bool]) -> int:
    """GroupNorms, with a convolution's bias and a term for each channel before, SiLU behind.

    `usable` is asked about the image and the number of groups.
    """
    count = 0
    for node in calls(graph, aten.native_group_norm.default):
        arguments: Any = node.args
        source, weight, bias, images, channels, _, groups, eps = arguments
        result = only_result(node)
        if result is None or weight is None or bias is None:
            continue
        source, term = _without_term(_without_copy(source), (images, channels))
        if not usable(value(source), groups):
            continue
        source, shift = _without_bias(source)
        silu = only_user(result, aten.silu.default, aten.silu_.default)
        with graph.inserting_before(node):
            if term is not None:
                term = graph.call_function(aten.reshape.default, (term, [images, channels]))
            new = graph.call_function(
                group_norm.operator(),
                (source, shift, term, weight, bias, groups, eps, silu is not None),
            )
        (silu or result).replace_all_uses_with(new)
        erase(node)
        count += 1
    return count


class Attention(Protocol):
    """A kernel for attention without mask."""

    def usable(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether it can be used, and is faster."""
        ...

    def operator(self) -> Any:
        """It, as an operator over (q, k, v, scale)."""
        ...


def replace_attention(graph: fx.Graph, kernel: Attention) -> int:
    """Attention without mask, where `kernel` is usable."""
    count = 0
    for node in calls(graph, *ATTENTIONS):
        target: Any = node.target
        normal = normalize_function(
            target, node.args, node.kwargs, normalize_to_only_use_kwargs=True
        )
        result = only_result(node)
        if normal is None or result is None:
            continue
        of = normal.kwargs
        q, k, v = of["query"], of["key"], of["value"]
        masked = of.get("attn_bias") is not None or of.get("attn_mask") is not None
        if masked or of["is_causal"] or of["dropout_p"]:
            continue
        scale = of.get("scale")
        scale = value(q).shape[-1] ** -0.5 if scale is None else scale
        if scale <= 0 or not kernel.usable(value(q), value(k), value(v)):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(kernel.operator(), (q, k, v, scale))
        result.replace_all_uses_with(new)
        erase(node)
        count += 1
    return count


def _without_copy(node: Any) -> Any:
    """What was copied to the layout that torch's own GroupNorm reads, if only that uses it."""
    if node.target is aten.clone.default and len(node.users) == 1:
        return node.args[0]
    return node


def _without_term(node: Any, shape: tuple[int, int]) -> tuple[Any, fx.Node | None]:
    """What one value for each image and channel was added to, and these values; for a sum of
    that kind that nobody else uses."""
    if node.target is aten.add.Tensor and len(node.users) == 1 and not node.kwargs:
        for image, term in (node.args, node.args[::-1]):
            if (
                isinstance(image, fx.Node)
                and isinstance(term, fx.Node)
                and image is not term
                and value(image).shape == value(node).shape
                and value(term).shape == (*shape, 1, 1)
                and value(image).dtype == value(term).dtype == value(node).dtype
            ):
                return image, term
    return node, None


def _without_bias(node: Any) -> tuple[Any, fx.Node | None]:
    """A convolution without its bias, and the bias; for one that nobody else uses."""
    if (
        node.target is aten.convolution.default
        and len(node.users) == 1
        and node.args[2] is not None
    ):
        bias = node.args[2]
        node.update_arg(2, None)
        return node, bias
    return node, None
