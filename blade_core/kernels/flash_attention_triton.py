"""The Triton kernel of flash_attention.py. Imported only where Triton is."""

# A kernel's arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def attend_blocks(
    q,
    k,
    v,
    out,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    Q_IMAGE: tl.constexpr,
    Q_HEAD: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_IMAGE: tl.constexpr,
    K_HEAD: tl.constexpr,
    K_ROW: tl.constexpr,
    V_IMAGE: tl.constexpr,
    V_HEAD: tl.constexpr,
    V_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
):
    """A tile of rows of one head against its keys, block by block, with the softmax's largest
    value and sum so far. `FACTOR` is the scale times log2(e), which is positive.

    Blocks are powers of 2, so that widths between two of them are cut in two parts, the second
    may be 0. Source: https://arxiv.org/abs/2205.14135 (FlashAttention), 2307.08691 (version 2).
    """
    head, image = tl.program_id(1), tl.program_id(2)
    kind = out.dtype.element_ty
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    key = tl.arange(0, BLOCK_K)
    width_1 = tl.arange(0, WIDTH_1)
    some_1 = width_1 < WIDTH
    q += image * Q_IMAGE + head * Q_HEAD
    k += image * K_IMAGE + head * K_HEAD
    v += image * V_IMAGE + head * V_HEAD
    out += (image * ROWS * tl.num_programs(1) + head) * WIDTH
    to = row * tl.num_programs(1) * WIDTH
    inside = (row < ROWS) & some_1[None, :]
    q_1 = tl.load(q + row * Q_ROW + width_1[None, :], mask=inside, other=0.0)
    result_1 = tl.zeros((BLOCK_R, WIDTH_1), dtype=tl.float32)
    if WIDTH_2:
        width_2 = WIDTH_1 + tl.arange(0, WIDTH_2)
        some_2 = width_2 < WIDTH
        inside_2 = (row < ROWS) & some_2[None, :]
        q_2 = tl.load(q + row * Q_ROW + width_2[None, :], mask=inside_2, other=0.0)
        result_2 = tl.zeros((BLOCK_R, WIDTH_2), dtype=tl.float32)
    most = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    whole: tl.constexpr = KEYS % BLOCK_K == 0 and WIDTH_1 <= WIDTH
    for start in range(0, KEYS, BLOCK_K):
        at = start + key
        known = at < KEYS
        if whole:
            k_1 = tl.load(k + at[None, :] * K_ROW + width_1[:, None])
        else:
            own = known[None, :] & some_1[:, None]
            k_1 = tl.load(k + at[None, :] * K_ROW + width_1[:, None], mask=own, other=0.0)
        scores = tl.dot(q_1, k_1)
        if WIDTH_2:
            own = known[None, :] & some_2[:, None]
            k_2 = tl.load(k + at[None, :] * K_ROW + width_2[:, None], mask=own, other=0.0)
            scores = tl.dot(q_2, k_2, scores)
        if KEYS % BLOCK_K:
            scores = tl.where(known[None, :], scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, axis=1) * FACTOR)
        share = tl.exp2(scores * FACTOR - highest[:, None])
        fade = tl.exp2(most - highest)
        total = total * fade + tl.sum(share, axis=1)
        most = highest
        share = share.to(kind)
        if whole:
            v_1 = tl.load(v + at[:, None] * V_ROW + width_1[None, :])
        else:
            own = known[:, None] & some_1[None, :]
            v_1 = tl.load(v + at[:, None] * V_ROW + width_1[None, :], mask=own, other=0.0)
        result_1 = tl.dot(share, v_1, result_1 * fade[:, None])
        if WIDTH_2:
            own = known[:, None] & some_2[None, :]
            v_2 = tl.load(v + at[:, None] * V_ROW + width_2[None, :], mask=own, other=0.0)
            result_2 = tl.dot(share, v_2, result_2 * fade[:, None])
    tl.store(out + to + width_1[None, :], (result_1 / total[:, None]).to(kind), mask=inside)
    if WIDTH_2:
        result_2 = (result_2 / total[:, None]).to(kind)
        tl.store(out + to + width_2[None, :], result_2, mask=inside_2)
