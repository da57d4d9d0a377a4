"""Everything a graph depends on, and the only place where anything is hashed.

A key counts every field by default. Left out, by name:
- label: for reading only;
- weights' values and the checkpoint's name: weights are inputs of a graph (a frozen graph
  carries them, and then `frozen` counts).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import torch

from .config import FORMAT_VERSION

_REMEMBERED = 4096
"""How many specs and layouts are not worked out again: each run asks for the same ones."""

_SHORT = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
}


def digest(value: object) -> str:
    """16 hex digits of SHA-256 over `repr(value)`; `value` is nested tuples of primitives."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides (elements), dtype and device of one tensor, without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        return _spec(*_form(tensor))

    def __str__(self) -> str:
        dtype = _SHORT.get(self.dtype, str(self.dtype).removeprefix("torch."))
        nhwc = len(self.shape) == 4 and self.stride[1] == 1 and self.shape[1] != 1
        return f"{dtype}[{','.join(map(str, self.shape))}]{' nhwc' if nhwc else ''}"


def layout(weights: Sequence[torch.Tensor]) -> str:
    """Digest of the specs of a graph's weights."""
    return _layout(tuple(map(_form, weights)))


_Form: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]"


def _form(tensor: torch.Tensor) -> _Form:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@lru_cache(_REMEMBERED)
def _spec(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> TensorSpec:
    # The stride of a dimension of size 1 is never used, and differs between tensors that are
    # equal in every way that counts.
    used = tuple(s if n != 1 else 0 for n, s in zip(shape, stride, strict=True))
    return TensorSpec(tuple(shape), used, dtype, str(device))


@lru_cache(_REMEMBERED)
def _layout(forms: tuple[_Form, ...]) -> str:
    return digest(tuple(_spec(*form) for form in forms))


@dataclass(frozen=True, eq=False)
class GraphKey:
    """Names one graph. Keys are equal if their ids are: Python takes static 1 for 1.0 and True.

    structure: digest of what is computed (structure.py).
    signature: specs of the inputs, and static values.
    layout: digest of the weights' specs.
    backend: name, version and options of the compiler.
    environment: versions, GPU, global switches of torch and of the host.
    frozen: token of the weights that are folded in, or None.
    """

    structure: str
    signature: tuple[Any, ...]
    layout: str
    backend: str
    environment: str
    frozen: str | None = None
    label: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GraphKey) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        inputs = " ".join(str(s) for s in self.signature)
        frozen = f" | frozen {self.frozen}" if self.frozen else ""
        return f"{self.label} | {inputs} | {self.backend.split(' ')[0]}{frozen} | {self.id}"

    @cached_property
    def id(self) -> str:
        """16 hex digits over every field that counts, equal in every process."""
        return digest(self._counted)

    @property
    def text(self) -> str:
        """Every field that counts, for comparing and for reading."""
        return repr(self._counted)

    @property
    def _counted(self) -> tuple[Any, ...]:
        return (
            self.structure,
            self.signature,
            self.layout,
            self.backend,
            self.environment,
            self.frozen,
        )


def environment(device: torch.device, host: tuple[str, ...] = ()) -> str:
    """What a graph for `device` depends on besides the model; `host` adds the host's part."""
    return " ".join((_machine(str(device)), *_switches(), *host))


def is_for(text: str, backend: str, device: torch.device) -> bool:
    """Whether `text` is that of a key for this machine's `device` and the compiler whose
    fingerprint is `backend`. What of the switches and the host it counts is not looked at."""
    start = f", {backend!r}, {_machine(str(device))!r}"[:-1]
    return any(start + end in text for end in "' ")


@lru_cache
def _machine(device_name: str) -> str:
    device = torch.device(device_name)
    parts = [f"format={FORMAT_VERSION}", f"torch={torch.__version__}"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts += [
            f"cuda={torch.version.cuda or torch.version.hip}",
            f"cudnn={torch.backends.cudnn.version()}",
            f"gpu={properties.name.replace(' ', '-')}",
            f"capability={properties.major}.{properties.minor}",
            f"triton={_triton_version()}",
        ]
    else:
        parts += [f"device={device.type}", f"isa={torch.backends.cpu.get_cpu_capability()}"]
    return " ".join(parts)


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def _switches() -> tuple[str, ...]:
    """Names of the switches that are on."""
    return tuple(name for name, on in switches().items() if on)


def switches() -> dict[str, bool]:
    """Global switches that a compiler reads while it builds a graph."""
    cuda = torch.backends.cuda
    matmul_tf32, cudnn_tf32 = allow_tf32()
    return {
        "tf32": matmul_tf32,
        "fp16-reduction": bool(cuda.matmul.allow_fp16_reduced_precision_reduction),
        "fp16-accumulation": getattr(cuda.matmul, "allow_fp16_accumulation", False),
        "cudnn-tf32": cudnn_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flash-sdp": cuda.flash_sdp_enabled(),
        "efficient-sdp": cuda.mem_efficient_sdp_enabled(),
        "math-sdp": cuda.math_sdp_enabled(),
        "cudnn-sdp": getattr(cuda, "cudnn_sdp_enabled", bool)(),  # torch 2.5
    }


def set_switches(on: dict[str, bool]) -> None:
    """Set what another process's `switches` gave."""
    cuda = torch.backends.cuda
    cuda.matmul.allow_tf32 = on["tf32"]
    cuda.matmul.allow_fp16_reduced_precision_reduction = on["fp16-reduction"]
    if hasattr(cuda.matmul, "allow_fp16_accumulation"):
        cuda.matmul.allow_fp16_accumulation = on["fp16-accumulation"]
    torch.backends.cudnn.allow_tf32 = on["cudnn-tf32"]
    torch.use_deterministic_algorithms(on["deterministic"])
    cuda.enable_flash_sdp(on["flash-sdp"])
    cuda.enable_mem_efficient_sdp(on["efficient-sdp"])
    cuda.enable_math_sdp(on["math-sdp"])
    if hasattr(cuda, "enable_cudnn_sdp"):
        cuda.enable_cudnn_sdp(on["cudnn-sdp"])


def allow_tf32() -> tuple[bool, bool]:
    """Whether matrix products and convolutions in fp32 may be TF32.

    Torch 2.9 has a new switch, and reading the old one raises once someone used the new one.
    """
    cudnn = torch.backends.cudnn
    return (
        _allows_tf32(torch.backends.cuda.matmul, torch.backends.cuda.matmul),
        _allows_tf32(cudnn, getattr(cudnn, "conv", None)),
    )


def _allows_tf32(old: Any, new: Any) -> bool:
    try:
        return bool(old.allow_tf32)
    except RuntimeError:
        return bool(new.fp32_precision == "tf32")
