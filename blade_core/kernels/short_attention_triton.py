"""The Triton kernel of short_attention.py. Imported only where Triton is."""

# A kernel's arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def attend(
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
    KEYS_1: tl.constexpr,
    KEYS_2: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
):
    """A tile of rows of one head against all of its keys. `FACTOR` is the scale times log2(e).

    Blocks are powers of 2, so that keys and widths between two of them are cut in two parts
    (77 keys: 64 and 16; a width of 40: 32 and 16), the second may be 0.
    """
    head, image = tl.program_id(1), tl.program_id(2)
    kind = out.dtype.element_ty
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    key_1 = tl.arange(0, KEYS_1)[:, None]
    width_1 = tl.arange(0, WIDTH_1)[None, :]
    q += image * Q_IMAGE + head * Q_HEAD
    k += image * K_IMAGE + head * K_HEAD
    v += image * V_IMAGE + head * V_HEAD
    out += (image * ROWS * tl.num_programs(1) + head) * WIDTH
    to = row * tl.num_programs(1) * WIDTH

    # Everything is asked for before anything is waited for.
    q_1 = tl.load(q + row * Q_ROW + width_1, mask=row < ROWS, other=0.0)
    k_11 = tl.load(k + key_1 * K_ROW + width_1, mask=key_1 < KEYS, other=0.0)
    if KEYS_2:
        key_2 = KEYS_1 + tl.arange(0, KEYS_2)[:, None]
        k_21 = tl.load(k + key_2 * K_ROW + width_1, mask=key_2 < KEYS, other=0.0)
    if WIDTH_2:
        width_2 = WIDTH_1 + tl.arange(0, WIDTH_2)[None, :]
        some = width_2 < WIDTH
        q_2 = tl.load(q + row * Q_ROW + width_2, mask=(row < ROWS) & some, other=0.0)
        k_12 = tl.load(k + key_1 * K_ROW + width_2, mask=(key_1 < KEYS) & some, other=0.0)
        if KEYS_2:
            k_22 = tl.load(k + key_2 * K_ROW + width_2, mask=(key_2 < KEYS) & some, other=0.0)
    v_11 = tl.load(v + key_1 * V_ROW + width_1, mask=key_1 < KEYS, other=0.0)
    if KEYS_2:
        v_21 = tl.load(v + key_2 * V_ROW + width_1, mask=key_2 < KEYS, other=0.0)
    if WIDTH_2:
        v_12 = tl.load(v + key_1 * V_ROW + width_2, mask=(key_1 < KEYS) & some, other=0.0)
        if KEYS_2:
            v_22 = tl.load(v + key_2 * V_ROW + width_2, mask=(key_2 < KEYS) & some, other=0.0)

    scores_1 = tl.dot(q_1, tl.trans(k_11))
    if WIDTH_2:
        scores_1 = tl.dot(q_2, tl.trans(k_12), scores_1)
    if KEYS < KEYS_1:
        scores_1 = tl.where(tl.trans(key_1) < KEYS, scores_1, float("-inf"))
    most = tl.max(scores_1, axis=1)
    if KEYS_2:
        scores_2 = tl.dot(q_1, tl.trans(k_21))
        if WIDTH_2:
            scores_2 = tl.dot(q_2, tl.trans(k_22), scores_2)
        scores_2 = tl.where(tl.trans(key_2) < KEYS, scores_2, float("-inf"))
        most = tl.maximum(most, tl.max(scores_2, axis=1))

    most *= FACTOR
    share_1 = tl.exp2(scores_1 * FACTOR - most[:, None])
    total = tl.sum(share_1, axis=1)
    share_1 = share_1.to(kind)
    if KEYS_2:
        share_2 = tl.exp2(scores_2 * FACTOR - most[:, None])
        total += tl.sum(share_2, axis=1)
        share_2 = share_2.to(kind)

    result = tl.dot(share_1, v_11)
    if KEYS_2:
        result = tl.dot(share_2, v_21, result)
    tl.store(out + to + width_1, (result / total[:, None]).to(kind), mask=row < ROWS)
    if WIDTH_2:
        result = tl.dot(share_1, v_12)
        if KEYS_2:
            result = tl.dot(share_2, v_22, result)
        result = (result / total[:, None]).to(kind)
        tl.store(out + to + width_2, result, mask=(row < ROWS) & some)
