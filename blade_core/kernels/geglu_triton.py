"""The Triton kernel of geglu.py. Imported only where Triton is."""

# A kernel's arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def geglu(
    x,
    weight,
    bias,
    out,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """One tile of the result, from one product with each value's column beside its gate's.

    `depth` is DEPTH once more: over a number that it knows, Triton would unroll the loop, and
    compile for seconds. Tiles of `TOGETHER` blocks of rows go one after the other, so that they
    share what they read.
    """
    blocks: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    wide: tl.constexpr = TOGETHER * (COLUMNS // BLOCK_C)
    place = tl.program_id(0)
    first = place // wide * TOGETHER
    height = tl.minimum(blocks - first, TOGETHER)
    r = (first + place % wide % height) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = place % wide // height * BLOCK_C
    both = tl.arange(0, 2 * BLOCK_C)
    column = start + both // 2 + both % 2 * COLUMNS
    d = tl.arange(0, BLOCK_D)
    # Rows beyond the last are the last again, and are not stored: no load has a mask.
    a = x + (r if ROWS % BLOCK_R == 0 else tl.minimum(r, ROWS - 1))[:, None] * DEPTH + d[None, :]
    b = weight + column[None, :] * DEPTH + d[:, None]
    total = tl.zeros((BLOCK_R, 2 * BLOCK_C), dtype=tl.float32)
    for _ in range(0, depth, BLOCK_D):
        total = tl.dot(tl.load(a), tl.load(b), total)
        a += BLOCK_D
        b += BLOCK_D
    total += tl.load(bias + column).to(tl.float32)[None, :]
    value, gate = tl.split(tl.reshape(total, (BLOCK_R, BLOCK_C, 2)))
    result = value * 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    c = start + tl.arange(0, BLOCK_C)
    to = out + r[:, None] * COLUMNS + c[None, :]
    if ROWS % BLOCK_R == 0:
        tl.store(to, result.to(out.dtype.element_ty))
    else:
        tl.store(to, result.to(out.dtype.element_ty), mask=(r < ROWS)[:, None])
