"""Passes over what a transformer does with tokens: norms, the gated layer, and where biases go."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from . import geglu, layer_norm
from .nodes import VIEWS, aten, calls, erase, only_result, only_user, results, value, viewed

LATE_BIAS_VERSION = 1
"""Counts changes of `late_biases`. Compiled graphs that are kept are of one version."""

Node: TypeAlias = Any
"""A node of torch.fx, whose arguments have no types."""

_SAME_VALUES = (*VIEWS, aten.permute.default, aten.clone.default)
"""Torch takes copies for dropout that is off, and for layouts that it takes channels-last not to
have; compilers leave those out."""


def fuse_layer_norms(graph: fx.Graph, usable: Callable[[torch.Tensor, bool], bool]) -> int:
    """LayerNorms over the last dimension, with a sum before and the bias of the linear layer or
    1x1 convolution that one of its terms comes from. `usable` is asked about what is normalized,
    and whether a bias comes along."""
    count = 0
    for node in calls(graph, aten.native_layer_norm.default):
        arguments: Any = node.args
        source, shape, weight, bias, eps = arguments
        result = only_result(node)
        if result is None or weight is None or bias is None or len(shape) != 1:
            continue
        x, term, product = _summed(source)
        if any(user < node for user in source.users):  # who needs the sum before it is there
            x, term, product = source, None, None
        if not usable(value(source), product is not None):
            continue
        alone, summed = layer_norm.operators()
        if x is source and product is None:
            with graph.inserting_before(node):
                new = graph.call_function(alone, (source, weight, bias, eps))
            new.meta["val"] = value(result)
            result.replace_all_uses_with(new)
            erase(node)
        else:
            shift = None if product is None else _without_bias(product)
            with graph.inserting_before(node):
                both = graph.call_function(summed, (x, shift, term, weight, bias, eps))
                total, new = results(graph, both, (source, result))
            source.replace_all_uses_with(total, delete_user_cb=lambda user, own=both: user != own)
            result.replace_all_uses_with(new)
            erase(node)
        count += 1
    return count


def fuse_geglu(
    graph: fx.Graph, usable: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], bool]
) -> int:
    """Linear layers whose first half is multiplied by gelu of the second. `usable` is asked about
    tokens as (M, K), weight and bias."""
    count = 0
    for product in calls(graph, aten.mul.Tensor):
        found = _gated(product)
        if found is None:
            continue
        tokens, weight, bias = found
        if not usable(value(tokens), value(weight), value(bias)):
            continue
        with graph.inserting_before(product):
            new = viewed(graph, graph.call_function(geglu.operator(), found), product)
        product.replace_all_uses_with(new)
        count += 1
    return count


def pays_late(x: torch.Tensor) -> bool:
    """Whether a product like `x` is faster without a bias.

    cuBLAS adds one with other kernels, which take half as long again where there is little to
    multiply (docs/log.md).
    """
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def late_biases(graph: fx.Graph, usable: Callable[[torch.Tensor], bool]) -> int:
    """Biases of linear layers and 1x1 convolutions that only sums and LayerNorms read: added
    there, where it costs nothing, instead of by the product. `usable` is asked about that."""
    count = 0
    for node in calls(graph, aten.addmm.default, aten.convolution.default):
        place = _reader(node)
        if place is None or not usable(value(node)):
            continue
        last, form = place
        bias = _without_bias(node)
        with graph.inserting_before(last.next):
            shaped = graph.call_function(aten.view.default, (bias, form))
            total = graph.call_function(aten.add.Tensor, (last, shaped))
        shaped.meta["val"] = value(bias).view(form)
        total.meta["val"] = value(last)
        last.replace_all_uses_with(total, delete_user_cb=lambda user, own=total: user != own)
        count += 1
    return count


def _terms(node: Node) -> tuple[Node, Node] | None:
    """Two tensors of one form that `node` is the sum of."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    terms = [t for t in node.args if isinstance(t, fx.Node)]
    if len(terms) != 2 or terms[0] is terms[1]:
        return None
    like = value(node)
    same = all(
        value(t).shape == like.shape
        and value(t).dtype == like.dtype
        and value(t).stride() == like.stride()
        for t in terms
    )
    return (terms[0], terms[1]) if same else None


def _summed(source: Node) -> tuple[Node, Node | None, Node | None]:
    """What `source` is the sum of, if it is, and the layer that gave the first with its bias."""
    terms = _terms(source)
    if terms is None:
        return source, None, _layer_with_bias(source)
    for x, term in (terms, terms[::-1]):
        product = _layer_with_bias(x)
        if product is not None and len(x.users) == 1:
            return x, term, product
    return *terms, None


def _layer_with_bias(x: Node) -> Node | None:
    """The linear layer or 1x1 convolution whose channels only `x` shows, as its last dimension;
    for one that has a bias."""
    product = x
    while product.target in _SAME_VALUES and (product is x or len(product.users) == 1):
        product = product.args[0]
    if not _has_bias(product):
        return None
    last, behind = _shown(product)
    return product if last is x and behind else None


def _has_bias(product: Node) -> bool:
    if product.target is aten.addmm.default:
        return not product.kwargs and value(product.args[0]).ndim == 1
    return product.target is aten.convolution.default and _is_product(product)


def _shown(product: Node) -> tuple[Node, bool]:
    """What all that use a product see of it, and whether its channels are the last dimension."""
    channels = value(product).shape[1]
    last, behind = product, product.target is aten.addmm.default
    while (user := only_user(last, *_SAME_VALUES)) is not None:
        if user.target is aten.permute.default:
            if behind or list(user.args[1]) != [0, 2, 3, 1]:  # type: ignore[arg-type]
                break
            behind = True
        elif user.target in VIEWS and not (behind and value(user).shape[-1] == channels):
            break
        last = user
    return last, behind


def _without_bias(node: Node) -> Node:
    """Let a linear layer or convolution add no bias any more, and return it."""
    if node.target is aten.addmm.default:
        bias: Any = node.args[0]
        node.target, node.args = aten.mm.default, tuple(node.args[1:])
    else:
        bias = node.args[2]
        node.update_arg(2, None)
    assert isinstance(bias, fx.Node)
    return bias


def _gated(product: Node) -> tuple[Node, Node, Node] | None:
    """Tokens (M, K), weight (2N, K) and bias of the layer that `product` gates, if nobody else
    uses what lies between."""
    for values, gate in (product.args, product.args[::-1]):
        if not isinstance(values, fx.Node) or not isinstance(gate, fx.Node):
            return None
        if gate.target is not aten.gelu.default or len(gate.users) != 1:
            continue
        if gate.kwargs.get("approximate", "none") != "none":
            continue
        halves = [_half(values), _half(gate.args[0])]
        if halves[0] is None or halves[1] is None or halves[0][0] is not halves[1][0]:
            continue
        if (halves[0][1], halves[1][1]) == (0, 1):
            return _layer(halves[0][0])
    return None


def _half(node: Any) -> tuple[Node, int] | None:
    """What `node` is one of two equal parts of along the last dimension, and which."""
    if node.target is not operator.getitem or len(node.users) != 1:
        return None
    split, index = node.args
    if split.target is not aten.split.Tensor or len(split.users) != 2:
        return None
    whole, size, *axis = split.args
    last = value(whole).ndim - 1
    if axis not in ([-1], [last]) or value(whole).shape[-1] != 2 * size:
        return None
    return split, index


def _layer(split: Node) -> tuple[Node, Node, Node] | None:
    view: Any = split.args[0]
    product = _layer_with_bias(view)
    if product is None or product.target is not aten.addmm.default or len(view.users) != 1:
        return None
    bias, tokens, turned = product.args
    if turned.target is not aten.t.default:
        return None
    return tokens, turned.args[0], bias


def _reader(product: Node) -> tuple[Node, Sequence[int]] | None:
    """The view of a product that is read, and the shape in which its bias fits that; None if
    anything but sums and LayerNorms reads it."""
    if not _has_bias(product):
        return None
    last, behind = _shown(product)
    if last is product and behind:  # torch would put the sum back into the product
        return None
    channels = value(product).shape[1]
    sums = [r.target is aten.native_layer_norm.default or _is_sum(r) for r in last.users]
    return (last, [channels] if behind else [channels, 1, 1]) if sums and all(sums) else None


def _is_sum(node: Node) -> bool:
    """Whether `node` adds two tensors of one shape, whatever their strides."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    return all(isinstance(t, fx.Node) and value(t).shape == value(node).shape for t in node.args)


def _is_product(node: Node) -> bool:
    """Whether a convolution with a bias is a matrix product over channels-last images."""
    _, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    return (
        bias is not None
        and value(weight).shape[2:] == (1, 1)
        and list(stride) == [1, 1]
        and list(padding) == [0, 0]
        and list(dilation) == [1, 1]
        and not transposed
        and groups == 1
    )
