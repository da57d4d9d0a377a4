"""One server life, told by its counters: what compiles, what never does, and that it is right.

Whatever order the tests run in, each shape is compiled by one test only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blade_tests.server.conftest import ServerFactory
from blade_tests.server.workflow import TOLERANCE, Blade, Run, Runner, Text2Image, difference

BASE = Text2Image(seed=100)

SWITCHES = {
    "prompt": {"prompt": "a map of the city", "negative": ""},
    "seed": {},
    "steps": {"steps": 3},
    "sampler": {"sampler": "dpmpp_2m", "steps": 2},
    "lora before": {"lora_before": 1.0},
    "lora after": {"lora_after": 0.7},
    "both loras": {"lora_before": 0.4, "lora_after": -0.5},
    "checkpoint": {"checkpoint": "sd15-b"},
    "controlnet and FreeU": {"control": True, "freeu": True},
}

# Text of 77, 154 and 231 tokens: the host's tokenizer makes chunks of 75 words.
LONG = "one two three four five " * 20
LONGER = "one two three four five " * 40

# What differs from BASE, and of how many new shapes the UNet's input then is.
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "resolution": ({"width": 96}, 1),
    "not a multiple of 64": ({"width": 72, "height": 104}, 1),
    "batch of 2": ({"batch": 2}, 1),
    "batch of 4": ({"batch": 4}, 1),
    "cfg 1": ({"cfg": 1.0}, 1),
    # The area is sampled by itself, in its own size.
    "area": ({"width": 128, "height": 72, "area": (64, 72, 0, 0)}, 2),
}
LENGTHS = {"154 tokens": (LONG, 154), "231 tokens": (LONGER, 231)}


@pytest.fixture(scope="module")
def life(server_factory: ServerFactory, models: dict[str, Path]) -> Iterator[Runner]:
    """A server whose counters start at 0."""
    with server_factory("counters") as server:
        yield Runner(server, models)


@pytest.fixture(scope="module")
def first(life: Runner) -> Run:
    """The first run through Blade in the server's life."""
    assert not any(life.stats()["counters"].values())
    return life.ok(BASE)


def labels(keys: list[str]) -> Counter[str]:
    """How many graphs there are of each kind of layer."""
    return Counter(key.split(" | ")[0] for key in keys)


def test_first_run_compiles_each_structure_and_shape_once(life: Runner, first: Run) -> None:
    counted, keys = first.counted, first.stats["cache"]["keys"]
    (model,) = first.stats["models"]
    units = [layer for block in model["blocks"] for layer in block["layers"]]
    assert 0 < counted["graphs_compiled"] == len(set(keys)) == first.stats["cache"]["graphs"]
    # A layer is compiled once for all places it is in, and nothing but kind and shapes splits it.
    assert counted["graphs_compiled"] < len(units)
    assert len({key.rsplit(" | ", 1)[0] for key in keys}) == len(keys)
    assert set(labels(keys)) == set(units)
    assert counted["cache_misses"] == len(keys)
    assert counted["cache_hits"] == len(units) - len(keys)
    assert counted["blocks_compiled"] == len(model["blocks"])
    assert counted["blocks_eager"] == counted["compile_failures"] == 0
    assert counted["runs"] == 1
    assert difference(first.latent, life.stock(BASE)) <= TOLERANCE


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_switch_compiles_nothing(life: Runner, first: Run, switch: dict[str, Any]) -> None:
    workflow = replace(BASE, seed=200, **switch)
    run = life.ok(workflow)
    assert run.counted["graphs_compiled"] == run.counted["cache_misses"] == 0
    assert run.counted["blocks_compiled"] == first.counted["blocks_compiled"]
    assert run.counted["blocks_eager"] == 0
    assert difference(run.latent, life.stock(workflow)) <= TOLERANCE


def test_two_nodes_in_one_graph_compile_nothing(life: Runner, first: Run) -> None:
    workflow = replace(BASE, seed=300, blades=(Blade(), Blade()))
    run = life.ok(workflow)
    assert run.counted["runs"] == 2
    assert run.counted["graphs_compiled"] == run.counted["blocks_eager"] == 0
    expected = life.stock(workflow)
    for latent in run.latents:
        assert difference(latent, expected) <= TOLERANCE


def test_other_node_settings_share_graphs(life: Runner, first: Run) -> None:
    workflow = replace(BASE, seed=400, blades=(Blade(on_failure="fallback"),))
    run = life.ok(workflow)
    assert run.counted["graphs_compiled"] == run.counted["blocks_eager"] == 0
    assert difference(run.latent, life.stock(workflow)) <= TOLERANCE


@pytest.mark.parametrize(("change", "shapes"), SHAPES.values(), ids=SHAPES)
def test_new_shape_compiles_once(
    life: Runner, first: Run, change: dict[str, Any], shapes: int
) -> None:
    workflow = replace(BASE, seed=500, **change)
    new = life.ok(workflow)
    once = labels(first.stats["cache"]["keys"])
    assert labels(new.new_keys) == Counter({label: n * shapes for label, n in once.items()})
    assert new.counted["graphs_compiled"] == len(new.new_keys)
    assert difference(new.latent, life.stock(workflow)) <= TOLERANCE
    again = life.ok(replace(workflow, seed=501))
    back = life.ok(replace(BASE, seed=502))
    for run in (new, again, back):
        assert run.counted["blocks_eager"] == run.counted["graphs_evicted"] == 0
    assert again.counted["graphs_compiled"] == back.counted["graphs_compiled"] == 0


def test_equal_shapes_from_other_settings_compile_nothing(life: Runner, first: Run) -> None:
    # Two latents at cfg 1 are the batch that one latent makes with its negative prompt.
    workflow = replace(BASE, seed=600, batch=2, cfg=1.0)
    run = life.ok(workflow)
    assert run.counted["graphs_compiled"] == 0
    assert difference(run.latent, life.stock(workflow)) <= TOLERANCE


@pytest.mark.parametrize(("prompt", "tokens"), LENGTHS.values(), ids=LENGTHS)
def test_longer_prompt_compiles_transformers_only(
    life: Runner, first: Run, prompt: str, tokens: int
) -> None:
    workflow = replace(BASE, seed=700, prompt=prompt)
    new = life.ok(workflow)
    once = labels(first.stats["cache"]["keys"])
    assert labels(new.new_keys) == {k: n for k, n in once.items() if "Transformer" in k}
    assert all(f"[4,{tokens}," in key for key in new.new_keys)  # keys and values of two prompts
    assert difference(new.latent, life.stock(workflow)) <= TOLERANCE
    again = life.ok(replace(workflow, seed=701))
    assert again.counted["graphs_compiled"] == again.counted["blocks_eager"] == 0
