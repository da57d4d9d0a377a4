"""The Triton kernel of layer_norm.py. Imported only where Triton is."""

# A kernel's arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def layer_norm(
    x,
    shift,
    term,
    weight,
    bias,
    total,
    out,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    TERM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. The statistics are of the sum as it is stored, as eager takes them."""
    c = tl.arange(0, BLOCK)
    own = c < WIDTH
    at = tl.program_id(0) * WIDTH + c
    kind = out.dtype.element_ty
    value = tl.load(x + at, mask=own, other=0.0).to(tl.float32)
    if TERM:
        added = tl.load(term + at, mask=own, other=0.0).to(tl.float32)
    scale = tl.load(weight + c, mask=own, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=own, other=0.0).to(tl.float32)
    if SHIFT:
        value += tl.load(shift + c, mask=own, other=0.0).to(tl.float32)
    if TERM:
        value += added
    if SHIFT or TERM:
        stored = value.to(kind)
        tl.store(total + at, stored, mask=own)
        value = stored.to(tl.float32)
    centred = tl.where(own, value - tl.sum(value) / WIDTH, 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred) / WIDTH + EPS)
    tl.store(out + at, (centred * factor * scale + offset).to(kind), mask=own)
