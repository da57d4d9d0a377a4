"""What the tests of the torch_blade backend share: units, requests for them, and the stand-in."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blade.blade_core.backends import torch_blade as backend_module
from blade.blade_core.backends.torch_blade import TorchBladeBackend
from blade.blade_core.errors import CompileFailed
from blade.blade_core.graph import GraphRequest, Positional, Static, skeleton
from blade.blade_core.key import GraphKey, TensorSpec, digest, environment, layout
from blade.blade_core.structure import describe

STAND_IN = Path(__file__).resolve().parents[2] / "torch_blade_stand_in" / "torch_blade"

CPU = torch.device("cpu")

TORCH = torch.__version__.split("+")[0]

VERSION = f"0.2.0+{TORCH}"

Install = Callable[..., Path]

Mode = Callable[[], AbstractContextManager[None]]


def forget() -> None:
    """Take the package out of the process, and the operator that it registered."""
    backend_module._probe.cache_clear()
    mlir = sys.modules.get("torch_blade.mlir")
    if mlir is not None:
        mlir.library._destroy()
    for name in [n for n in sys.modules if n.split(".")[0] == "torch_blade"]:
        del sys.modules[name]
    importlib.invalidate_caches()


class Unit(nn.Module):
    """Parameters, one of them unused and one of two names, buffers, and a static argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.emb = nn.Linear(64, 64)
        self.tied = nn.Linear(64, 64)
        self.tied.weight = self.emb.weight
        self.narrow = nn.Linear(64, 16)
        self.norm = nn.GroupNorm(4, 16)
        self.last = nn.Conv2d(16, 4, 3, padding=1)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("shift", torch.randn(4, 1, 1))
        self.register_buffer("gain", torch.randn(4, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, scale: float) -> torch.Tensor:
        h = self.norm(self.first(x) + self.narrow(self.tied(self.emb(emb)))[:, :, None, None])
        out = self.last(nn.functional.silu(h)) * scale * self.get_buffer("gain")
        return x + out + self.get_buffer("shift")


class Single(nn.Module):
    """One operation: a cluster that DISC finds too small."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Plain(nn.Module):
    """Can be scripted as a whole, unlike `Positional`."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.unit(x)
        return result


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 8, 8), (2, 64))
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)


def names_of(unit: nn.Module) -> list[str]:
    return [name for name, _ in (*unit.named_parameters(), *unit.named_buffers())]


def weights_of(unit: nn.Module) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach() for t in (*unit.parameters(), *unit.buffers()))


def request_of(
    unit: nn.Module | None = None,
    args: Sequence[Any] | None = None,
    *,
    frozen: bool = False,
    channels_last: bool = False,
) -> GraphRequest:
    """What the host asks for when it first runs `unit` with `args`."""
    unit = Unit() if unit is None else unit
    args = (*inputs(), 0.5) if args is None else args
    statics = tuple(None if isinstance(a, torch.Tensor) else Static(a) for a in args)
    tensors = tuple(a for a in args if isinstance(a, torch.Tensor))
    weights = weights_of(unit)
    return GraphRequest(
        key=GraphKey(
            structure=digest(describe(unit)),
            signature=tuple(TensorSpec.of(a) if isinstance(a, torch.Tensor) else a for a in args),
            layout=layout(weights),
            backend=TorchBladeBackend().fingerprint(),
            environment=environment(CPU),
            frozen=digest([w.tolist() for w in weights]) if frozen else None,
            label="Unit",
        ),
        module=skeleton(Positional(unit, statics, channels_last=channels_last)),
        names=tuple(f"unit.{name}" for name in names_of(unit)),
        weights=weights,
        inputs=tensors,
    )


def assert_equal_to_eager(
    call: Callable[..., torch.Tensor],
    request: GraphRequest,
    weights: Sequence[torch.Tensor] | None = None,
) -> None:
    weights = request.weights if weights is None else weights
    expected = request.eager(weights, request.inputs)
    torch.testing.assert_close(call(weights, request.inputs), expected)


def problem(request: GraphRequest) -> CompileFailed:
    with pytest.raises(CompileFailed) as caught:
        TorchBladeBackend().compile(request)
    return caught.value


def failing(message: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """An engine that fails when it runs."""

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(message)

    return fail
