"""Kernels against their eager twins on the CPU, by Triton's interpreter."""

import importlib.util

import pytest
from blade_tests.unit.samples import in_new_process

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")

_GROUP_NORM = """
import torch
from blade.blade_core.kernels import group_norm
from blade.blade_core.kernels.group_norm import reference, run
torch.manual_seed(0)
for at_once in (True, False):
    if not at_once:
        group_norm.whole_warps = lambda rows, width: 0
    for shape, groups in (((2, 64, 8, 8), 32), ((1, 320, 9, 5), 32), ((3, 96, 13, 11), 32),
                          ((2, 72, 10, 13), 3), ((1, 2560, 9, 9), 32)):
        for added, silu in ((False, False), (True, True)):
            x = (torch.randn(shape) * 2 + 50).half().contiguous(memory_format=torch.channels_last)
            c = shape[1]
            shift, term = torch.randn(c).half(), torch.randn(shape[0], c).half()
            given = (x, *((shift, term) if added else (None, None)),
                     torch.randn(c).half(), torch.randn(c).half())
            actual = run(*given, groups, 1e-5, silu)
            wide = [None if t is None else t.double() for t in given]
            expected = reference(*wide, groups, 1e-5, silu)
            error = (actual.double() - expected).norm() / expected.norm()
            assert error <= 3e-4, (at_once, shape, added, float(error))
            assert actual.stride() == x.stride()
group_norm._MOST_CHUNKS = 2  # or it takes the interpreter minutes
for mean in (0, 50):
    x = (torch.randn(2, 64, 33, 35) * 2 + mean).half().contiguous(memory_format=torch.channels_last)
    given = (x, None, None, torch.randn(64).half(), torch.randn(64).half())
    actual = run(*given, 32, 1e-6, True)
    wide = [None if t is None else t.double() for t in given]
    expected = reference(*wide, 32, 1e-6, True)
    assert (actual.double() - expected).norm() / expected.norm() <= 3e-4
print("agrees")
"""

_GROUPED_LINEAR = """
import torch
from blade.blade_core.kernels.grouped_linear import GroupedLinear, reference
torch.manual_seed(0)
for shape, silu, skip in (((2, 64), True, False), ((2, 77, 48), False, True)):
    x = torch.randn(shape).half()
    layers = [
        (torch.randn(n, shape[-1]).half(), torch.randn(n).half() if silu else None)
        for n in (80, 33, 64)
    ]
    group = GroupedLinear(x, layers, silu=silu, skip_unchanged=skip)
    for turn in range(3):
        for output in group.outputs:
            output.fill_(7.0)
        group(x)
        kept = skip and turn == 1
        for output, expected in zip(group.outputs, reference(x, layers, silu=silu), strict=True):
            if kept:
                assert output.eq(7.0).all(), "computed again"
            else:
                torch.testing.assert_close(output, expected, atol=3e-2, rtol=1e-2)
        if turn == 1:
            x.view(-1)[-1] += 1
print("agrees")
"""

_SHORT_ATTENTION = """
import torch
from blade.blade_core.kernels.short_attention import reference, run
torch.manual_seed(0)
for b, heads, rows, keys, width in ((2, 2, 130, 77, 40), (1, 3, 64, 64, 160), (2, 2, 70, 154, 64),
                                    (1, 2, 100, 231, 80), (1, 1, 33, 5, 64), (1, 2, 64, 16, 16)):
    q = torch.randn(b, rows, heads * width).half().view(b, rows, heads, width).transpose(1, 2)
    both = torch.randn(2 * b, keys, heads * width).half().view(2 * b, keys, heads, width)
    k, v = both.transpose(1, 2).chunk(2)
    actual = run(q, k, v, width**-0.5)
    expected = reference(q.double(), k.double(), v.double(), width**-0.5)
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= 5e-4, (rows, keys, width, float(error))
    assert actual.stride() == expected.stride()
print("agrees")
"""

_TOKEN_KERNELS = """
import torch
import triton
from blade.blade_core.kernels import flash_attention, geglu, layer_norm
torch.manual_seed(0)

def close(actual, expected, bound=4e-4):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= bound, float(error)

# Before 3.7 the interpreter cannot count to a kernel's argument.
knows_ranges = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
for rows, columns in ((256, 128), (300, 256)) if knows_ranges else ():
    x, weight = torch.randn(rows, 64).half(), (torch.randn(2 * columns, 64) / 8).half()
    given = (x, weight, torch.randn(2 * columns).half())
    geglu.processors = lambda _: 2  # so few that one program does several tiles
    for part in (geglu._SMALL, geglu._LARGE):
        geglu.tile = lambda *_: part
        close(geglu.run(*given), geglu.reference(*(t.double() for t in given)))

for width in (1032, 1280, 2560):
    x, term = (torch.randn(2, 3, width) + 30).half(), torch.randn(2, 3, width).half()
    shift, weight, bias = torch.randn(3, width).half()
    for given in ((x, None, None), (x, shift, term), (x, None, term), (x, shift, None)):
        total, normed = layer_norm.run(*given, weight, bias, 1e-5)
        wide = [None if t is None else t.double() for t in (*given, weight, bias)]
        summed, _ = layer_norm.reference(*wide, 1e-5)
        rounded = summed.half()
        close(normed, torch.nn.functional.layer_norm(rounded.double(), (width,), *wide[3:], 1e-5))
        if total.numel():
            close(total, summed)
        else:
            assert given[1:] == (None, None)

for b, heads, rows, keys, width in ((2, 2, 130, 128, 64), (1, 2, 64, 100, 40), (1, 1, 70, 200, 80),
                                    (1, 1, 33, 81, 160), (1, 2, 64, 192, 96)):
    q, k, v = (torch.randn(b, n, heads * width).half().view(b, n, heads, width).transpose(1, 2)
               for n in (rows, keys, keys))
    actual = flash_attention.run(q, k, v, width**-0.5)
    close(actual, flash_attention.reference(*(t.double() for t in (q, k, v)), width**-0.5), 6e-4)
    assert actual.transpose(1, 2).is_contiguous()
print("agrees")
"""


@pytest.mark.parametrize(
    "code",
    [_GROUP_NORM, _GROUPED_LINEAR, _SHORT_ATTENTION, _TOKEN_KERNELS],
    ids=["group norm", "grouped linear", "short attention", "token kernels"],
)
def test_the_kernels_agree_with_their_twins(code: str) -> None:
    assert in_new_process(code, TRITON_INTERPRET="1") == "agrees"
