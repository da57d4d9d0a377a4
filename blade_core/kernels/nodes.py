"""Reading and changing traced graphs: what the passes have in common."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default)


def calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    """All calls of `targets`, in their order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in targets]


def value(node: Any) -> torch.Tensor:
    """The tensor that tracing has noted for a node: its form, no data."""
    noted = node.meta["val"]
    assert isinstance(noted, torch.Tensor)
    return noted


def erase(node: fx.Node) -> None:
    """Take out `node` and what reads it, which nobody uses any more. Torch would keep attention
    that has no users: some kinds of it draw random numbers."""
    for user in list(node.users):
        erase(user)
    node.graph.erase_node(node)


def only_result(node: fx.Node) -> fx.Node | None:
    """The first result of a node of several, if nobody uses the others."""
    used = [user for user in node.users if user.users]
    if len(used) == 1 and used[0].target is operator.getitem and used[0].args[1] == 0:
        return used[0]
    return None


def only_user(node: fx.Node, *targets: Any) -> fx.Node | None:
    """The one user of a node, if it calls one of `targets`."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.target in targets else None


def results(graph: fx.Graph, node: fx.Node, forms: tuple[fx.Node, ...]) -> list[fx.Node]:
    """The results of a node of several, each of the form of the node that it stands for."""
    found = []
    for index, form in enumerate(forms):
        item = graph.call_function(operator.getitem, (node, index))
        item.meta["val"] = form.meta["val"]
        found.append(item)
    return found


def viewed(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    """`node` in the shape of `like`, which may be its own."""
    shape = list(value(like).shape)
    view = graph.call_function(aten.view.default, (node, shape))
    view.meta["val"] = like.meta["val"]
    return view
