"""What a compiler is asked for, and what it gives back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .key import GraphKey

GraphFunction = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]
"""`f(weights, inputs) -> output`; never writes to its arguments."""


@dataclass(frozen=True)
class Static:
    """An argument that is no tensor; it is part of the key and constant in the graph."""

    value: Any


class Positional(nn.Module):
    """A unit with its static arguments closed over: tensors in, one tensor out.

    Compilers see only this form. `args` is the whole argument list, with None in the places
    that the tensors take. A 4-D result is given channels-last strides, so that they are kept
    from unit to unit.
    """

    def __init__(
        self, unit: nn.Module, args: tuple[Static | None, ...], *, channels_last: bool
    ) -> None:
        super().__init__()
        self.unit = unit
        self.args = args
        self.channels_last = channels_last

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        rest = iter(tensors)
        out = self.unit(*(next(rest) if a is None else a.value for a in self.args))
        if self.channels_last and out.ndim == 4:
            out = out.contiguous(memory_format=torch.channels_last)
        return out


@dataclass(frozen=True)
class GraphRequest:
    """One graph to build.

    module: Positional form, in eval mode, its tensors on the meta device.
    names: names of the weights in `module`, in the order of `weights`.
    weights, inputs: the live tensors of the call that wants the graph.
    """

    key: GraphKey
    module: nn.Module
    names: tuple[str, ...]
    weights: tuple[torch.Tensor, ...]
    inputs: tuple[torch.Tensor, ...]

    @property
    def frozen(self) -> bool:
        return self.key.frozen is not None

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def eager(
        self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Run the module uncompiled: the reference of every backend."""
        named = dict(zip(self.names, weights, strict=True))
        return functional_call(self.module, named, tuple(inputs))


@dataclass(frozen=True)
class Compiled:
    """What a backend gives back.

    artifact: the graph as bytes for `Backend.load`, or None where it cannot be stored.
    nbytes: host memory that the graph is counted with.
    """

    call: GraphFunction
    artifact: bytes | None
    nbytes: int


@dataclass(frozen=True)
class Graph:
    """A graph in the cache."""

    key: GraphKey
    call: GraphFunction
    nbytes: int
    seconds: float
    capturable: bool = False


def skeleton(module: nn.Module, *, drop: Sequence[str] = ()) -> nn.Module:
    """Return a copy of `module` whose parameters and buffers are on the meta device.

    No weight is copied. Instance attributes named in `drop` are left out of the copy, which
    then shows its class's own.
    """
    tensors = (*module.parameters(), *module.buffers())
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.to("meta"), requires_grad=False)
        if isinstance(t, nn.Parameter)
        else t.to("meta")
        for t in tensors
    }
    for child in module.modules():
        for name in drop:
            value = child.__dict__.get(name)
            # What is dropped is not copied first: it may hold every LoRA of a model. (Constants
            # such as True are one object everywhere, and cost nothing.)
            if not isinstance(value, (bool, int, float, str, torch.dtype, type(None))):
                memo[id(value)] = None
    bare = copy.deepcopy(module, memo).eval()
    for child in bare.modules():
        for name in drop:
            child.__dict__.pop(name, None)
    return bare


def trace(request: GraphRequest) -> torch.fx.GraphModule:
    """Record the request as one flat graph over `(*weights, *inputs)`.

    Runs on fake tensors: nothing is computed and no memory is taken. Python runs once, so that
    no guard can ever ask for it again; what it reads besides its arguments is in the key.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    count = len(request.weights)

    def function(*flat: torch.Tensor) -> torch.Tensor:
        return request.eager(flat[:count], flat[count:])

    with FakeTensorMode():
        fake = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            for t in (*request.weights, *request.inputs)
        ]
        return make_fx(function)(*fake)


def dump(module: torch.fx.GraphModule) -> bytes:
    """A traced graph as bytes for `undump`, in this process or another."""
    stream = io.BytesIO()
    torch.save(module, stream)
    return stream.getvalue()


def undump(content: bytes) -> torch.fx.GraphModule:
    """The graph that `dump` was given. Runs code from it: never for bytes of others."""
    with suppress(ImportError):  # torch 2.0 has no such module
        # Unpickling a graph asks for it without importing it.
        import torch._higher_order_ops.triton_kernel_wrap
    module: torch.fx.GraphModule = torch.load(io.BytesIO(content), weights_only=False)
    return module
