"""The Triton kernel of geglu.py. Imported only where Triton is."""

# A kernel's arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _gelu(x):
    """A third of the instructions that it takes with `tl.erf`, and as close in fp16 and bf16.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: erfc to 1.5e-7, over
    x / sqrt(2), its factors halved.
    """
    root = tl.rsqrt(1.0 + 0.23164189 * tl.abs(x))
    t = root * root
    tail = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t) + (
        0.127414796
    )
    tail *= t * tl.exp2(-0.7213475204444817 * x * x)
    return x * tl.where(x > 0, 1.0 - tail, tail)


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
    """Tiles of the result, each from one product of rows with the values' and the gates' columns.

    There are as many programs as fit on the GPU, and each goes from tile to tile in one loop, so
    that it loads for the next tile while it still computes gelu. `depth` is DEPTH once more: over a
    number that it knows, Triton would unroll the loop, and compile for seconds. Tiles of `TOGETHER`
    blocks of rows go one after the other, so that they share what they read.
    """
    blocks: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    wide: tl.constexpr = TOGETHER * (COLUMNS // BLOCK_C)
    tiles: tl.constexpr = blocks * (COLUMNS // BLOCK_C)
    both = tl.arange(0, 2 * BLOCK_C)
    place_of = both % BLOCK_C + both // BLOCK_C * COLUMNS
    d = tl.arange(0, BLOCK_D)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first = tile // wide * TOGETHER
        height = tl.minimum(blocks - first, TOGETHER)
        r = (first + tile % wide % height) * BLOCK_R + tl.arange(0, BLOCK_R)
        start = tile % wide // height * BLOCK_C
        # Rows beyond the last are the last again, and are not stored: no load has a mask.
        row = r if ROWS % BLOCK_R == 0 else tl.minimum(r, ROWS - 1)
        column = start + place_of
        total = tl.zeros((BLOCK_R, 2 * BLOCK_C), dtype=tl.float32)
        for k in tl.range(0, depth, BLOCK_D):
            a = tl.load(x + ((row * DEPTH)[:, None] + (k + d)[None, :]))
            b = tl.load(weight + ((column * DEPTH)[None, :] + (k + d)[:, None]))
            total = tl.dot(a, b, total)
        total += tl.load(bias + column).to(tl.float32)[None, :]
        halves = tl.permute(tl.reshape(total, (BLOCK_R, 2, BLOCK_C)), (0, 2, 1))
        value, gate = tl.split(halves)
        result = (value * _gelu(gate)).to(out.dtype.element_ty)
        c = start + tl.arange(0, BLOCK_C)
        to = out + (r[:, None] * COLUMNS + c[None, :])
        if ROWS % BLOCK_R == 0:
            tl.store(to, result)
        else:
            tl.store(to, result, mask=(r < ROWS)[:, None])
