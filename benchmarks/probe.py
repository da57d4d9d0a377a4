"""What this machine is, and the rates it reaches: printed as one line of JSON.

Started by run.py in a process of its own, so that nothing of it is on the GPU while rows are
measured.
"""

import importlib.metadata
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SIZES = (4096, 8192, 16384)


def main() -> None:
    cuda = torch.cuda.is_available() and "--cpu" not in sys.argv
    print(
        json.dumps(
            {
                "gpu": torch.cuda.get_device_name() if cuda else None,
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "triton": _version("triton"),
                "python": platform.python_version(),
                "bytecode": _has_bytecode(),
                "matrix_peak_tflops": round(_matrix_peak(cuda), 3),
                "copy_gb_s": round(_copy_rate(), 1) if cuda else None,
            }
        )
    )


def _matrix_peak(cuda: bool) -> float:
    """The best of a few square products, in TFLOP/s."""
    sizes = _SIZES if cuda else (256,)
    return max(_rate(size, "cuda" if cuda else "cpu") for size in sizes)


def _rate(size: int, device: str) -> float:
    dtype = torch.float16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device) / 1e12


def _copy_rate() -> float:
    """GB/s that a copy of 1 GiB on the GPU reads and writes."""
    source = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / _best_seconds(lambda: target.copy_(source), "cuda") / 1e9


def _best_seconds(work: Callable[[], Any], device: str, repeats: int = 20) -> float:
    best = float("inf")
    for _ in range(3):  # the first also warms up
        start = _now(device)
        for _ in range(repeats):
            work()
        best = min(best, _now(device) - start)
    return best / repeats


def _now(device: str) -> float:
    # Enough work lies between two calls that waiting for the GPU costs nothing.
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _has_bytecode() -> bool:
    """Whether Python keeps what it makes of torch's source, as in any installation that was used
    before. Importing the compiler leaves it there, or the first system that compiles would."""
    import torch._inductor.compile_fx as compiler

    return Path(importlib.util.cache_from_source(compiler.__file__)).is_file()


def _version(name: str) -> Any:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
