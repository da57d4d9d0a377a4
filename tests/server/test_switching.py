"""What users switch takes effect under Blade as in stock, and stock itself stays as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy
import pytest
from blade_tests.server.workflow import TOLERANCE, Blade, Runner, Text2Image, difference

PLAIN = Text2Image(seed=1000, steps=2)
CLEAR = 100 * TOLERANCE
"""A change that nobody takes for rounding."""

CHANGES: dict[str, dict[str, Any]] = {
    "lora before": {"lora_before": 1.0},
    "lora after": {"lora_after": 1.0},
    "checkpoint": {"checkpoint": "sd15-b"},
    "controlnet": {"control": True},
    "FreeU": {"freeu": True},
    "all but the checkpoint": {
        "lora_before": 0.5,
        "lora_after": 0.5,
        "control": True,
        "freeu": True,
    },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_takes_effect_and_can_be_taken_back(runner: Runner, change: dict[str, Any]) -> None:
    changed = replace(PLAIN, **change)
    expected, plain = runner.stock(changed), runner.stock(PLAIN)
    assert difference(expected, plain) > CLEAR
    for workflow, latent in ((PLAIN, plain), (changed, expected), (PLAIN, plain)):
        run = runner.ok(workflow)
        assert difference(run.latent, latent) <= TOLERANCE
        assert run.counted["blocks_eager"] == 0


def test_lora_strength_takes_effect(runner: Runner) -> None:
    weak, strong = replace(PLAIN, lora_after=0.5), replace(PLAIN, lora_after=1.0)
    latents = [runner.ok(workflow).latent for workflow in (weak, strong)]
    assert difference(latents[0], latents[1]) > CLEAR
    assert difference(latents[0], runner.stock(weak)) <= TOLERANCE
    assert difference(latents[1], runner.stock(strong)) <= TOLERANCE


def test_frozen_weights_are_compiled_again_for_a_lora(runner: Runner) -> None:
    frozen = replace(PLAIN, seed=1100, blades=(Blade(freeze_weights=True),))
    with_lora = replace(frozen, lora_after=1.0)
    first, second = runner.ok(frozen), runner.ok(with_lora)
    assert first.counted["graphs_compiled"] > 0
    assert second.counted["frozen_rebuilds"] == second.counted["graphs_compiled"] > 0
    assert difference(first.latent, runner.stock(frozen)) <= TOLERANCE
    assert difference(second.latent, runner.stock(with_lora)) <= TOLERANCE


def test_disabled_is_stock_bit_for_bit(runner: Runner) -> None:
    workflow = replace(PLAIN, seed=1200, blades=(Blade(enabled=False),), lora_after=0.5)
    expected = runner.stock(workflow)
    run = runner.ok(workflow)
    assert not any(run.counted.values())
    assert numpy.array_equal(run.latent, expected)


def test_stock_is_bit_identical_before_and_after(runner: Runner) -> None:
    runner.free()  # the first latent is that of weights that Blade never saw
    workflow = replace(PLAIN, seed=1300)
    before = runner.stock(workflow)
    run = runner.ok(workflow)
    assert run.counted["blocks_compiled"] > 0
    assert numpy.array_equal(runner.stock(workflow), before)


@pytest.mark.parametrize("blades", [(Blade(), None), (None, Blade())], ids=["first", "last"])
def test_stock_beside_blade_is_bit_identical(
    runner: Runner, blades: tuple[Blade | None, ...]
) -> None:
    """Both sample the same checkpoint within one prompt; only one model went through Blade."""
    runner.free()
    workflow = replace(PLAIN, seed=1400, blades=blades)
    expected = runner.stock(workflow)
    runner.stock(replace(workflow, seed=1401))  # or the host would still have the latent
    run = runner.ok(workflow)
    assert run.counted["runs"] == 1
    for blade, latent in zip(blades, run.latents, strict=True):
        if blade is None:
            assert numpy.array_equal(latent, expected)
        else:
            assert difference(latent, expected) <= TOLERANCE
