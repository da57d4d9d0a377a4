"""What tests without ComfyUI share: a tiny unit, requests for it, and Python processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from blade.blade_core.graph import GraphRequest, Positional, Static, skeleton
from blade.blade_core.key import GraphKey, TensorSpec, digest, environment, layout
from blade.blade_core.structure import describe

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHAPE = (2, 4, 8, 8)

# As conftest.py does it.
_PRELUDE = """
import importlib.util, sys
for name, folder in (("blade", sys.argv[1]), ("blade_tests", sys.argv[1] + "/tests")):
    spec = importlib.util.spec_from_file_location(
        name, folder + "/__init__.py", submodule_search_locations=[folder])
    sys.modules[name] = importlib.util.module_from_spec(spec)
"""


class Unit(nn.Module):
    """A convolution, a linear layer, a norm, a buffer, an in-place operation and a static."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)
        self.emb = nn.Linear(6, channels)
        self.register_buffer("shift", torch.randn(channels, 1, 1))

    def forward(self, x: torch.Tensor, emb: torch.Tensor, scale: float) -> torch.Tensor:
        h = self.norm(self.conv(x))
        h += self.emb(emb)[:, :, None, None]
        return nn.functional.silu(h) * scale + self.get_buffer("shift")


class Choosy(nn.Module):
    """Its code holds a set, whose order is another one in every process."""

    def __init__(self, modes: tuple[str, ...] = ("nearest", "area", "linear")) -> None:
        super().__init__()
        self.modes = frozenset(modes)
        self.mode = modes[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.mode in {"nearest", "area", "linear", "cubic"} else x


def inputs_of(
    shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return x.to(dtype), torch.randn(shape[0], 6).to(dtype)


def weights_of(unit: nn.Module) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach() for t in (*unit.parameters(), *unit.buffers()))


def request_of(
    unit: nn.Module | None = None,
    inputs: tuple[torch.Tensor, ...] | None = None,
    *,
    static: float = 0.5,
    frozen: bool = False,
    channels_last: bool = True,
) -> GraphRequest:
    """What the host asks for when it first runs `unit` on `inputs`."""
    unit = Unit() if unit is None else unit
    inputs = inputs_of() if inputs is None else inputs
    weights = weights_of(unit)
    names = [name for name, _ in (*unit.named_parameters(), *unit.named_buffers())]
    args = (*(None for _ in inputs), Static(static))
    return GraphRequest(
        key=GraphKey(
            structure=digest(describe(unit)),
            signature=(*(TensorSpec.of(t) for t in inputs), static),
            layout=layout(weights),
            backend="fake 1.0",
            environment=environment(CPU),
            frozen="0123456789abcdef" if frozen else None,
            label="Unit 4→8",
        ),
        module=skeleton(Positional(unit, args, channels_last=channels_last)),
        names=tuple(f"unit.{name}" for name in names),
        weights=weights,
        inputs=inputs,
    )


def in_new_process(code: str, **variables: str) -> str:
    """Run `code` with `blade` importable; return what it prints."""
    command = [sys.executable, "-c", _PRELUDE + code, str(ROOT)]
    env = os.environ | variables
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
