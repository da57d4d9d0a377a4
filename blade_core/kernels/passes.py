"""Puts Blade's kernels into traced graphs where they fit, and leaves everything else.

A graph is what `graph.trace` gives: ATen operators, before any compiler has seen it. What is
looked at are the values that tracing has noted for each node (`meta["val"]`), no data.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx
from torch.fx.operator_schemas import normalize_function

from . import group_norm, short_attention

aten = torch.ops.aten

ATTENTIONS = (
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What torch makes of scaled_dot_product_attention, one or the other."""

KERNELS = {"group_norm": group_norm.VERSION, "short_attention": short_attention.VERSION}
"""Name and version of each kernel that can be asked for."""


def use_kernels(module: fx.GraphModule, kernels: Collection[str]) -> int:
    """Change `module` in place; return how many of its nodes are Blade's kernels now."""
    count = 0
    if "group_norm" in kernels:
        count += fuse_group_norms(module.graph, group_norm.usable)
    if "short_attention" in kernels:
        count += replace_attention(module.graph, short_attention.usable)
    if count:
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


def fuse_group_norms(graph: fx.Graph, usable: Callable[[torch.Tensor, int], bool]) -> int:
    """GroupNorms, with a convolution's bias and a term for each channel before, SiLU behind.

    `usable` is asked about the image and the number of groups.
    """
    count = 0
    for node in _calls(graph, aten.native_group_norm.default):
        arguments: Any = node.args
        source, weight, bias, images, channels, _, groups, eps = arguments
        result = _only_result(node)
        if result is None or weight is None or bias is None:
            continue
        source, term = _without_term(_without_copy(source), (images, channels))
        if not usable(_value(source), groups):
            continue
        source, shift = _without_bias(source)
        silu = _only_user(result, aten.silu.default, aten.silu_.default)
        with graph.inserting_before(node):
            if term is not None:
                term = graph.call_function(aten.reshape.default, (term, [images, channels]))
            new = graph.call_function(
                group_norm.operator(),
                (source, shift, term, weight, bias, groups, eps, silu is not None),
            )
        (silu or result).replace_all_uses_with(new)
        _erase(node)
        count += 1
    return count


def replace_attention(
    graph: fx.Graph, usable: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], bool]
) -> int:
    """Attention without mask over few keys. `usable` is asked about q, k and v."""
    count = 0
    for node in _calls(graph, *ATTENTIONS):
        target: Any = node.target
        normal = normalize_function(
            target, node.args, node.kwargs, normalize_to_only_use_kwargs=True
        )
        result = _only_result(node)
        if normal is None or result is None:
            continue
        of = normal.kwargs
        q, k, v = of["query"], of["key"], of["value"]
        masked = of.get("attn_bias") is not None or of.get("attn_mask") is not None
        if masked or of["is_causal"] or of["dropout_p"]:
            continue
        if not usable(_value(q), _value(k), _value(v)):
            continue
        scale = of.get("scale")
        scale = _value(q).shape[-1] ** -0.5 if scale is None else scale
        with graph.inserting_before(node):
            new = graph.call_function(short_attention.operator(), (q, k, v, scale))
        result.replace_all_uses_with(new)
        _erase(node)
        count += 1
    return count


def _calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n.target in targets]


def _erase(node: fx.Node) -> None:
    """Take out `node` and what reads it, which nobody uses any more. Torch would keep attention
    that has no users: some kinds of it draw random numbers."""
    for user in list(node.users):
        _erase(user)
    node.graph.erase_node(node)


def _value(node: Any) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def _only_result(node: fx.Node) -> fx.Node | None:
    """The first result of a node of several, if nobody uses the others."""
    used = [user for user in node.users if user.users]
    if len(used) == 1 and used[0].target is operator.getitem and used[0].args[1] == 0:
        return used[0]
    return None


def _only_user(node: fx.Node, *targets: Any) -> fx.Node | None:
    (user, *others) = node.users
    return user if not others and user.target in targets else None


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
                and _value(image).shape == _value(node).shape
                and _value(term).shape == (*shape, 1, 1)
                and _value(image).dtype == _value(term).dtype == _value(node).dtype
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
