"""The Triton kernels of grouped_linear.py. Imported only where Triton is."""

# A kernel's arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def compare(x, last, changed, count, BLOCK: tl.constexpr):
    """Set `changed` if `x` differs from `last` anywhere, and copy it there. NaN differs."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    new = tl.load(x + index, mask=inside, other=0.0)
    old = tl.load(last + index, mask=inside, other=0.0)
    differs = tl.max((new != old).to(tl.int32), axis=0)
    if differs != 0:
        tl.atomic_or(changed, 1)
        tl.store(last + index, new, mask=inside)


@triton.jit
def grouped_linear(
    x,
    table,
    changed,
    out,
    rows,
    K: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one layer's product; see GroupedLinear for the table."""
    if tl.load(changed) != 0:
        kind = out.dtype.element_ty
        entry = table + tl.program_id(0) * 5
        weight = tl.multiple_of(tl.load(entry).to(tl.pointer_type(kind)), 16)
        bias = tl.load(entry + 1)
        offset = tl.load(entry + 2)
        columns = tl.load(entry + 3)
        n = tl.load(entry + 4) + tl.arange(0, BLOCK_N)
        m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = tl.load(
                x + m[:, None] * K + k[None, :],
                mask=(m[:, None] < rows) & (k[None, :] < K),
                other=0.0,
            )
            if SILU:
                wide = a.to(tl.float32)
                a = (wide / (1.0 + tl.exp(-wide))).to(kind)
            b = tl.load(
                weight + n[None, :] * K + k[:, None],
                mask=(n[None, :] < columns) & (k[:, None] < K),
                other=0.0,
            )
            total = tl.dot(a, b, total)
        if bias != 0:
            values = tl.load(bias.to(tl.pointer_type(kind)) + n, mask=n < columns, other=0.0)
            total += values[None, :].to(tl.float32)
        tl.store(
            out + offset + m[:, None] * columns + n[None, :],
            total.to(kind),
            mask=(m[:, None] < rows) & (n[None, :] < columns),
        )
