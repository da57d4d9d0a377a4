"""What a user can choose, as frozen data that travels from the node to the engine."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .errors import InvalidChoice

BACKENDS = ("auto", "torch_blade", "inductor", "eager")
ON_FAILURE = ("fallback", "error")
FROZEN_CHANGE = ("rebuild", "refuse")
COMPILE = ("first", "background")
KERNELS = (
    "joint_linear",
    "group_norm",
    "short_attention",
    "flash_attention",
    "geglu",
    "layer_norm",
    "late_bias",
)

FORMAT_VERSION = 1
"""Counts changes of the pack that make graphs of older versions wrong."""


def own_kernels() -> tuple[str, ...]:
    """Those of Blade's own kernels that may be used: `BLADE_KERNELS`, names of `KERNELS` with
    commas between them, or `none`; all if it is not set.

    Raises:
        InvalidChoice: it holds anything else.
    """
    text = os.environ.get("BLADE_KERNELS")
    if text is None:
        return KERNELS
    names = [name.strip() for name in text.split(",")]
    if names == ["none"]:
        return ()
    if not set(names) <= set(KERNELS):
        raise InvalidChoice(
            f"BLADE_KERNELS is {text!r}; expected none, or with commas between them some of "
            f"{', '.join(KERNELS)}. Unset it for all of them."
        )
    return tuple(kernel for kernel in KERNELS if kernel in names)


@dataclass(frozen=True)
class OptimizeConfig:
    """The dials of one optimized model.

    backend: the compiler; `auto` takes the first that can run: torch_blade, then inductor.
    freeze_weights: fold the weights into the graphs. Costs a rebuild for every weight change.
    on_failure: `fallback` runs what cannot be compiled as stock ComfyUI would; `error` raises.
    frozen_change: when frozen weights change, `rebuild` compiles again and `refuse` raises.
    capture: replay a step as one CUDA graph where it can be; off for measuring what that gives.
    compile: `first` waits for the graphs; `background` samples as stock would until they are there.
    kernels: which of Blade's own kernels Inductor's graphs may hold, for GPUs on which one loses
        and for measuring; by default what `own_kernels` says.

    Raises:
        InvalidChoice: a value is not one of those listed above.
    """

    backend: str = "auto"
    freeze_weights: bool = False
    on_failure: str = "fallback"
    frozen_change: str = "rebuild"
    capture: bool = True
    kernels: tuple[str, ...] = field(default_factory=own_kernels)
    compile: str = "first"

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, BACKENDS)
        check_choice("on_failure", self.on_failure, ON_FAILURE)
        check_choice("frozen_change", self.frozen_change, FROZEN_CHANGE)
        check_choice("compile", self.compile, COMPILE)
        for kernel in self.kernels:
            check_choice("kernels", kernel, KERNELS)

    @property
    def strict(self) -> bool:
        return self.on_failure == "error"


def graph_cache_bytes() -> int:
    """Byte budget of the graph cache: `BLADE_GRAPH_CACHE_MIB` (default 4096 MiB)."""
    return _mebibytes("BLADE_GRAPH_CACHE_MIB", "4096", least=1)


def store_bytes() -> int:
    """Byte budget of graphs on disk: `BLADE_DISK_CACHE_MIB` (default 4096), 0 for none."""
    return _mebibytes("BLADE_DISK_CACHE_MIB", "4096", least=0)


def store_folder() -> Path:
    """Where graphs lie on disk: `BLADE_CACHE_DIR`, by default the user's own cache folder."""
    given = os.environ.get("BLADE_CACHE_DIR")
    if given:
        return Path(given).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "comfyui-blade"


def capture_bytes() -> int | None:
    """Byte budget of captured steps: `BLADE_CAPTURE_MIB`, where 0 turns capturing off.

    None if it is not set: an eighth of the GPU's memory.
    """
    if "BLADE_CAPTURE_MIB" not in os.environ:
        return None
    return _mebibytes("BLADE_CAPTURE_MIB", "", least=0)


def compile_workers() -> int | None:
    """Processes that compile: `BLADE_COMPILE_WORKERS`; None if it is not set."""
    text = os.environ.get("BLADE_COMPILE_WORKERS")
    if text is not None and not text.isdecimal():
        raise InvalidChoice(
            f"BLADE_COMPILE_WORKERS is {text!r}; expected a whole number. Unset it, or set it to 0 "
            "to compile in ComfyUI's own process."
        )
    return None if text is None else int(text)


def lora_cache_bytes() -> int:
    """Byte budget of LoRA files kept in memory: `BLADE_LORA_CACHE_MIB` (default 4096 MiB)."""
    return _mebibytes("BLADE_LORA_CACHE_MIB", "4096", least=1)


def _mebibytes(name: str, default: str, *, least: int) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal() or int(text) < least:
        above = " above 0" if least else ""
        raise InvalidChoice(
            f"{name} is {text!r}; expected a whole number of MiB{above}. "
            "Unset it, or set it for example to 4096."
        )
    return int(text) * 2**20


def check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Refuse a value that is not one of `valid`.

    Raises:
        InvalidChoice: naming the input, the value and what is valid.
    """
    if value not in valid:
        raise InvalidChoice(
            f"Blade does not know {name}={value!r}; expected one of {', '.join(valid)}. "
            "Choose one of these in the node, or in the workflow that you post."
        )
