"""Whether a graph does what the module does that it was made of: asked before it is used."""

from __future__ import annotations

import torch

from .graph import GraphFunction, GraphRequest
from .key import allow_tf32

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_TF32_TOLERANCE = 2e-3


def tolerance(tensor: torch.Tensor) -> float:
    """Relative RMS by which a graph may differ from the same module run eager on `tensor`.

    Fused kernels round less often than eager ones: single units differ by about 1e-6 (fp32) to
    1e-3 (fp16). On a GPU fp32 products may be TF32, by whichever kernel is chosen.
    """
    if tensor.is_cuda and tensor.dtype == torch.float32 and any(allow_tf32()):
        return _TF32_TOLERANCE
    return _TOLERANCE.get(tensor.dtype, 1e-2)


def difference_of(
    call: GraphFunction, request: GraphRequest, expected: torch.Tensor
) -> float | None:
    """Relative RMS between the graph on the live inputs and `expected`, what the eager module makes
    of them, if it is too large."""
    actual = call(request.weights, request.inputs)
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point():
        expected, actual = expected.float(), actual.float()
    # Sums of squares in fp32, without a copy in fp32: a VAE's images are gigabytes.
    wide = torch.promote_types(expected.dtype, torch.float32)
    scale = torch.linalg.vector_norm(expected, dtype=wide)
    if not torch.isfinite(scale):
        return None  # a model that overflows gives no reference
    least = 1e-12 * expected.numel() ** 0.5
    error = float(torch.linalg.vector_norm(actual - expected, dtype=wide) / scale.clamp_min(least))
    return None if error <= tolerance(request.inputs[0]) else error
