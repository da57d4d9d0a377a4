"""The Triton kernels of group_norm.py. Imported only where Triton is."""

# A kernel's arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def whole(
    x,
    shift,
    term,
    weight,
    bias,
    out,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    TERM: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One group of one image, statistics and result, from values that are read once."""
    n = tl.program_id(1)
    r, w = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_W)
    c = tl.program_id(0) * WIDTH + w
    own = w < WIDTH
    inside = (r < ROWS)[:, None] & own[None, :]
    at = r[:, None] * CHANNELS + c[None, :]
    x += n * ROWS * CHANNELS
    out += n * ROWS * CHANNELS
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        value += tl.load(shift + c, mask=own, other=0.0).to(tl.float32)[None, :]
    if TERM:
        value += tl.load(term + n * CHANNELS + c, mask=own, other=0.0).to(tl.float32)[None, :]
    scale = tl.load(weight + c, mask=own, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=own, other=0.0).to(tl.float32)
    value = tl.where(inside, value, 0.0)
    centred = tl.where(inside, value - tl.sum(value) / (ROWS * WIDTH), 0.0)
    variance = tl.sum(centred * centred) / (ROWS * WIDTH)
    result = centred * (scale * tl.rsqrt(variance + EPS))[None, :] + offset[None, :]
    if SILU:
        result = result / (1.0 + tl.exp(-result))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def statistics(
    x,
    shift,
    term,
    partial,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    TERM: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Mean and sum of squared distances from it, of some groups over one chunk of rows.

    `partial` is (2, N, groups, CHUNKS), fp32. Sums are of distances from a sample of the group in
    the same chunk, so that nothing is lost if the mean is far from 0: the sample's own distance
    from the mean is part of the variance, and rounding at most a chunk's size times fp32's.
    """
    chunk, n = tl.program_id(0), tl.program_id(2)
    r, lane = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_G * BLOCK_W)
    first = (tl.program_id(1) * BLOCK_G + lane // BLOCK_W) * WIDTH  # of the lane's group
    c = first + lane % BLOCK_W
    own = (lane % BLOCK_W < WIDTH) & (c < CHANNELS)
    x += (n * ROWS + chunk * CHUNK_ROWS) * CHANNELS
    sample = tl.load(x + first, mask=own, other=0.0).to(tl.float32)
    if SHIFT:
        sample += tl.load(shift + first, mask=own, other=0.0).to(tl.float32)
    if TERM:
        sample += tl.load(term + n * CHANNELS + first, mask=own, other=0.0).to(tl.float32)
    base = sample
    if SHIFT:
        base -= tl.load(shift + c, mask=own, other=0.0).to(tl.float32)
    if TERM:
        base -= tl.load(term + n * CHANNELS + c, mask=own, other=0.0).to(tl.float32)

    count = tl.minimum(ROWS - chunk * CHUNK_ROWS, CHUNK_ROWS)
    sums = tl.zeros((BLOCK_R, BLOCK_G * BLOCK_W), dtype=tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_G * BLOCK_W), dtype=tl.float32)
    for start in tl.static_range(0, CHUNK_ROWS, BLOCK_R):
        at = (start + r)[:, None] * CHANNELS + c[None, :]
        inside = own[None, :]
        if ROWS % CHUNK_ROWS:
            inside = inside & (start + r < count)[:, None]
        apart = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - base[None, :]
        if ROWS % CHUNK_ROWS:
            apart = tl.where(inside, apart, 0.0)
        sums += apart
        squares += apart * apart

    count *= WIDTH
    total = tl.where(own, tl.sum(sums, axis=0), 0.0)
    square = tl.where(own, tl.sum(squares, axis=0), 0.0)
    total = tl.sum(tl.reshape(total, (BLOCK_G, BLOCK_W)), axis=1)
    square = tl.sum(tl.reshape(square, (BLOCK_G, BLOCK_W)), axis=1)
    sample = tl.where(lane % BLOCK_W == 0, sample, 0.0)
    sample = tl.sum(tl.reshape(sample, (BLOCK_G, BLOCK_W)), axis=1)
    groups: tl.constexpr = CHANNELS // WIDTH
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    to = (n * groups + g) * CHUNKS + chunk
    second = partial + tl.num_programs(2) * CHUNKS * groups
    tl.store(partial + to, sample + total / count, mask=g < groups)
    tl.store(second + to, tl.maximum(square - total * total / count, 0.0), mask=g < groups)


@triton.jit
def merge(
    partial,
    merged,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The chunks of one group as one chunk: `merged` is (2, N, groups, 1), as `partial` is."""
    k = tl.arange(0, BLOCK_K)
    group = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    groups = tl.num_programs(0) * tl.num_programs(1)
    means = partial + group * CHUNKS
    squares = means + groups * CHUNKS
    weighted = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, CHUNKS, BLOCK_K):
        known = start + k < CHUNKS
        count = tl.minimum(tl.maximum(ROWS - (start + k) * CHUNK_ROWS, 0), CHUNK_ROWS)
        weighted += tl.load(means + start + k, mask=known, other=0.0) * (count / ROWS)
    centre = tl.sum(weighted)
    square = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, CHUNKS, BLOCK_K):
        known = start + k < CHUNKS
        count = tl.minimum(tl.maximum(ROWS - (start + k) * CHUNK_ROWS, 0), CHUNK_ROWS)
        apart = tl.load(means + start + k, mask=known, other=0.0) - centre
        square += tl.load(squares + start + k, mask=known, other=0.0)
        square += tl.where(known, count * WIDTH * apart * apart, 0.0)
    tl.store(merged + group, centre)
    tl.store(merged + groups + group, tl.sum(square))


@triton.jit
def apply(
    x,
    shift,
    term,
    weight,
    bias,
    partial,
    out,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    TERM: tl.constexpr,
    SILU: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The result for a tile of rows and channels, each of which merges its group's chunks.

    Source: https://en.wikipedia.org/wiki/Algorithms_for_calculating_variance, Chan et al.
    """
    n = tl.program_id(2)
    r, k = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < CHANNELS
    inside = own[None, :]
    if ROWS % BLOCK_R:
        inside = inside & (r < ROWS)[:, None]
    at = r[:, None] * CHANNELS + c[None, :]
    x += n * ROWS * CHANNELS
    out += n * ROWS * CHANNELS
    value = tl.load(x + at, mask=inside, other=0.0)  # under way while the chunks are merged
    scale = tl.load(weight + c, mask=own, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=own, other=0.0).to(tl.float32)

    groups: tl.constexpr = CHANNELS // WIDTH
    known = own[:, None] & (k < CHUNKS)[None, :]
    read = (n * groups + c // WIDTH)[:, None] * CHUNKS + k[None, :]
    means = tl.load(partial + read, mask=known, other=0.0)
    second = partial + tl.num_programs(2) * CHUNKS * groups
    squares = tl.load(second + read, mask=known, other=0.0)
    counts = tl.minimum(tl.maximum(ROWS - k * CHUNK_ROWS, 0), CHUNK_ROWS) * WIDTH
    counts = counts.to(tl.float32)[None, :]
    centre = tl.sum(means * counts, axis=1) / (ROWS * WIDTH)
    apart = means - centre[:, None]
    scale *= tl.rsqrt(tl.sum(squares + counts * apart * apart, axis=1) / (ROWS * WIDTH) + EPS)
    if SHIFT:
        centre -= tl.load(shift + c, mask=own, other=0.0).to(tl.float32)
    if TERM:
        centre -= tl.load(term + n * CHANNELS + c, mask=own, other=0.0).to(tl.float32)
    offset -= centre * scale
    result = value.to(tl.float32) * scale[None, :] + offset[None, :]
    if SILU:
        result = result / (1.0 + tl.exp(-result))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
