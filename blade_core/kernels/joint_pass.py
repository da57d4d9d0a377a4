"""The pass that makes linear layers over the same tokens one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from . import joint_linear
from .nodes import VIEWS, aten, calls, value

_SHOWS = (*VIEWS, aten.transpose.int, aten.permute.default)
"""What attention shows its inputs through."""


def join_linears(
    graph: fx.Graph, usable: Callable[[torch.Tensor, Sequence[torch.Tensor]], bool]
) -> int:
    """Linear layers without bias, whose weights are inputs of the graph. `usable` is asked about
    tokens as (M, K) and the weights. What a layer gave is a part of the joint result's columns
    then, which all that read it have to be able to show without a copy."""
    count = 0
    for products in _over_the_same_tokens(graph):
        tokens: Any = products[0].args[0]
        weights = [_weight(product) for product in products]
        if not usable(value(tokens), [value(weight) for weight in weights]):
            continue
        joint = joint_linear.operator()(value(tokens), [value(weight) for weight in weights])
        columns = [value(product).shape[1] for product in products]
        forms = joint.split(columns, 1)
        shown = [_shown(product, form) for product, form in zip(products, forms, strict=True)]
        if any(one is None for one in shown):
            continue
        with graph.inserting_before(products[0]):
            node = graph.call_function(joint_linear.operator(), (tokens, weights))
            node.meta["val"] = joint
            start = 0
            for product, form, one in zip(products, forms, shown, strict=True):
                stop = start + form.shape[1]
                part = graph.call_function(aten.slice.Tensor, (node, 1, start, stop))
                part.meta["val"] = form
                product.replace_all_uses_with(part)
                for reader, seen in (one or {}).items():
                    reader.meta["val"] = seen
                start = stop
        for product in products:
            graph.erase_node(product)
        count += 1
    return count


def _over_the_same_tokens(graph: fx.Graph) -> list[list[fx.Node]]:
    """Products of the same tokens and weights that are inputs; groups of several."""
    groups: dict[Any, list[fx.Node]] = {}
    for product in calls(graph, aten.mm.default):
        weight = _weight(product)
        if weight is not None:
            tokens: Any = product.args[0]
            source = tokens.args[0] if tokens.target in VIEWS else tokens
            groups.setdefault((source, value(tokens).shape), []).append(product)
    return [group for group in groups.values() if len(group) > 1]


def _weight(product: fx.Node) -> Any:
    """The input of the graph that a product's right side is the transpose of."""
    turned: Any = product.args[1]
    if turned.target is aten.t.default and turned.args[0].op == "placeholder":
        return turned.args[0]
    return None


def _shown(node: fx.Node, form: torch.Tensor) -> dict[fx.Node, torch.Tensor] | None:
    """What the views of `node` are if it is `form`; None if one of them cannot be a view."""
    found: dict[fx.Node, torch.Tensor] = {}
    for user in node.users:
        if user.target not in _SHOWS:
            continue
        target: Any = user.target
        try:
            found[user] = target(form, *user.args[1:], **user.kwargs)
        except (RuntimeError, ValueError):  # these strides do not allow it
            return None
        behind = _shown(user, found[user])
        if behind is None:
            return None
        found |= behind
    return found
