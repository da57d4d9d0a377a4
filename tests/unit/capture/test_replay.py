"""When work is recorded, and what a replay sees."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from blade_tests.unit.capture.tape import Counted, Tape, capture, double, ones, work_of

from blade.blade_core.capture import CapturePool, Replayer
from blade.blade_core.counters import Counters

# --- plain, recorded, replayed ------------------------------------------------------------------


def test_the_first_call_is_plain_the_second_recorded_the_third_replayed(
    replayer: Replayer, counters: Counters, tape: type[Tape]
) -> None:
    function = Counted(double)
    seen = []
    for value in (1.0, 2.0, 3.0, 4.0):
        result = replayer("a", work_of(function), ones(value))
        assert torch.equal(result, torch.full((2, 3), 2 * value))
        seen.append((function.calls, tape.recordings, counters["captures"]))
    assert seen == [(1, 0, 0), (2, 1, 1), (2, 1, 1), (2, 1, 1)]
    assert replayer.reasons == set()


def test_replay_takes_what_is_there(replayer: Replayer) -> None:
    assert replayer.replay("a", ones()) is None
    replayer("a", work_of(), ones())
    assert replayer.replay("a", ones()) is None
    replayer("a", work_of(), ones())
    replayed = replayer.replay("a", ones(5.0))
    assert replayed is not None and torch.equal(replayed, torch.full((2, 3), 10.0))
    assert replayer.replay("b", ones()) is None


def test_results_belong_to_the_caller(replayer: Replayer) -> None:
    work = work_of(lambda inputs: inputs[0])  # its own input, so that even that must not be seen
    given = [torch.full((2, 3), float(i)) for i in range(5)]
    results = [replayer("a", work, [x]) for x in given]
    for i in (2, 3, 4):  # replayed
        assert torch.equal(results[i], torch.full((2, 3), float(i)))
        results[i].fill_(-1.0)
    assert torch.equal(given[4], torch.full((2, 3), 4.0))
    assert torch.equal(replayer("a", work, [given[2]]), given[2])


def test_each_key_has_its_own_capture(replayer: Replayer, counters: Counters) -> None:
    tripled = work_of(lambda inputs: inputs[0] * 3)
    for value in (1.0, 2.0, 4.0):
        assert replayer("a", work_of(), ones(value))[0, 0] == 2 * value
        assert replayer("b", tripled, ones(value))[0, 0] == 3 * value
    assert counters["captures"] == 2


def test_a_later_run_replays_at_once(pool: CapturePool) -> None:
    capture(pool)
    function = Counted(double)
    result = Replayer(pool, strict=True)("a", work_of(function), ones(7.0))
    assert (result[0, 0], function.calls) == (14.0, 0)


def test_what_was_dropped_within_a_run_is_recorded_again(
    replayer: Replayer, pool: CapturePool, counters: Counters
) -> None:
    function = Counted(double)
    for _ in range(3):
        replayer("a", work_of(function), ones())
    pool.clear()
    for value in (3.0, 4.0):
        assert replayer("a", work_of(function), ones(value))[0, 0] == 2 * value
    assert (function.calls, counters["captures"], counters["captures_dropped"]) == (3, 2, 1)


# --- what a replay sees -------------------------------------------------------------------------


def test_fresh_inputs_are_read_and_left_alone(replayer: Replayer) -> None:
    work = work_of(lambda inputs: (inputs[0] - inputs[1]).mul_(inputs[2]))
    for seed in range(4):
        torch.manual_seed(seed)
        inputs = [torch.randn(2, 3) for _ in range(3)]
        before = [x.clone() for x in inputs]
        result = replayer("a", work, inputs)
        torch.testing.assert_close(result, (before[0] - before[1]) * before[2])
        assert all(map(torch.equal, inputs, before))


def test_work_that_writes_its_inputs_does_not_reach_the_caller(replayer: Replayer) -> None:
    for turn in range(4):
        inputs = ones(float(turn))
        result = replayer("a", work_of(lambda i: i[0].add_(1)), inputs)
        assert result[0, 0] == turn + 1
        assert turn == 0 or inputs[0][0, 0] == turn  # the plain call is as it was written


def test_changes_in_place_are_seen_and_replaced_tensors_are_not(replayer: Replayer) -> None:
    """As with a CUDA graph: this is what makes a LoRA hook work, and what Watch is there for."""
    held = {"weight": torch.ones(2, 3)}
    work = work_of(lambda inputs: inputs[0] * held["weight"])
    for _ in range(3):
        assert replayer("a", work, ones(2.0))[0, 0] == 2.0
    held["weight"].fill_(5.0)
    assert replayer("a", work, ones(2.0))[0, 0] == 10.0
    held["weight"] = torch.full((2, 3), 7.0)
    assert replayer("a", work, ones(2.0))[0, 0] == 10.0


@pytest.mark.parametrize("recorded_in", [True, False], ids=["inference", "normal"])
def test_inference_mode_may_change_between_runs(pool: CapturePool, recorded_in: bool) -> None:
    replayer = Replayer(pool, strict=True)
    for turn, mode in enumerate((recorded_in, recorded_in, not recorded_in, recorded_in)):
        with torch.inference_mode(mode):
            result = replayer("a", work_of(), ones(float(turn)))
        assert result[0, 0] == 2 * turn
    assert len(pool) == 1


def test_inputs_in_any_strides_give_the_same(replayer: Replayer) -> None:
    x = torch.randn(2, 4, 5, 6)
    forms = [
        x.contiguous(memory_format=torch.channels_last),
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x,
    ]
    for form in forms:
        assert torch.equal(replayer("a", work_of(), [form]), x * 2)


def test_an_input_that_overlaps_itself(replayer: Replayer) -> None:
    for value in (1.0, 2.0, 3.0):
        result = replayer("a", work_of(), [torch.full((1, 3), value).expand(2, 3)])
        assert torch.equal(result, torch.full((2, 3), 2 * value))


def test_a_result_keeps_its_strides(replayer: Replayer) -> None:
    """The graphs after it count on them."""
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    results = [replayer("a", work_of(), [x]) for _ in range(3)]
    assert [r.stride() for r in results] == [x.stride()] * 3


# --- what is not recorded -----------------------------------------------------------------------


def test_what_may_not_be_captured_runs_plainly(
    replayer: Replayer, counters: Counters, tape: type[Tape]
) -> None:
    function = Counted(double)
    asked = []

    def why_not() -> str:
        asked.append(function.calls)
        return "a patch runs between"

    for value in (1.0, 2.0, 3.0):
        assert replayer("a", work_of(function, why_not), ones(value))[0, 0] == 2 * value
    assert asked == [1], "asked once, and after the call"
    assert replayer.reasons == {"a patch runs between"}
    assert (function.calls, tape.recordings, counters["captures"]) == (3, 0, 0)


def test_never(replayer: Replayer) -> None:
    assert not replayer.never("a")
    for _ in range(3):
        replayer("a", work_of(), ones())
        replayer("b", work_of(why_not=lambda: "no"), ones())
        assert not replayer.never("a")
        assert replayer.never("b")
    assert not replayer.never("c")


def test_each_run_asks_anew(pool: CapturePool) -> None:
    Replayer(pool, strict=True)("a", work_of(why_not=lambda: "no"), ones())
    later = Replayer(pool, strict=True)
    for _ in range(2):
        later("a", work_of(), ones())
    assert (len(pool), later.reasons) == (1, set())


def test_a_call_that_waits_once_is_recorded_later(
    replayer: Replayer, pool: CapturePool, tape: type[Tape]
) -> None:
    """The one that compiles waits for the GPU."""
    seen = []
    for waiting in (("engine.py:12",), (), (), ()):
        tape.waiting = waiting
        replayer("a", work_of(), ones())
        seen.append(len(pool))
    assert seen == [0, 0, 1, 1]
    assert replayer.reasons == set()


def test_a_call_that_waits_twice_is_never_recorded(
    replayer: Replayer, pool: CapturePool, tape: type[Tape]
) -> None:
    tape.waiting = ("sampling.py:34", "other.py:5")
    replayer("a", work_of(), ones())
    assert (replayer.never("a"), replayer.reasons) == (False, set())
    replayer("a", work_of(), ones())
    assert replayer.never("a")
    tape.waiting = ()
    for _ in range(3):
        assert replayer("a", work_of(), ones(4.0))[0, 0] == 8.0
    assert replayer.reasons == {"it waits for the GPU: sampling.py:34"}
    assert (len(pool), tape.recordings) == (0, 0)


def test_waits_are_counted_for_each_key(
    replayer: Replayer, pool: CapturePool, tape: type[Tape]
) -> None:
    tape.waiting = ("engine.py:12",)
    for key in ("a", "b"):
        replayer(key, work_of(), ones())
    assert not replayer.never("a") and not replayer.never("b")


def test_an_error_of_the_plain_call_is_the_callers(
    replayer: Replayer, pool: CapturePool, tape: type[Tape]
) -> None:
    def fail(_: Sequence[torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^shapes differ$"):
            replayer("a", work_of(fail), ones())
    for value in (1.0, 2.0, 3.0):
        assert replayer("a", work_of(), ones(value))[0, 0] == 2 * value
    assert (len(pool), tape.recordings, replayer.reasons) == (1, 1, set())
