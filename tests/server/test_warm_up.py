"""BladeWarmUp and BladeClearCache through the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blade_tests.server.conftest import ServerFactory
from blade_tests.server.workflow import (
    TOLERANCE,
    Runner,
    Text2Image,
    as_stock,
    difference,
    example,
)

from devtools.client import Workflow
from devtools.workflows import node_id

SIZE = (72, 104)
"""A size that no other test has."""


def warmed(runner: Runner, **inputs: Any) -> Workflow:
    """A workflow that warms up, and samples nothing."""
    nodes = Text2Image(seed=8000).build(runner.models)
    sampler = nodes.pop(node_id(nodes, "KSampler"))["inputs"]
    nodes.pop(node_id(nodes, "SaveLatent"))
    nodes["90"] = {
        "class_type": "BladeWarmUp",
        "inputs": {
            **{name: sampler[name] for name in ("model", "positive", "negative")},
            "sizes": "{}x{}".format(*SIZE),
            "batch_sizes": "1",
            "cfg": 7.0,
            **inputs,
        },
    }
    return nodes


def test_a_size_that_was_warmed_up_compiles_nothing(runner: Runner) -> None:
    warm = runner.run(warmed(runner))
    assert warm.result.ok
    compiled = int(warm.counted["graphs_compiled"])
    assert compiled > 0
    assert f"72x104, batch 1: {compiled} graphs compiled" in warm.text("BladeWarmUp")
    workflow = Text2Image(width=SIZE[0], height=SIZE[1], seed=8001)
    run = runner.ok(workflow)
    assert run.counted["graphs_compiled"] == run.counted["blocks_eager"] == 0
    assert difference(run.latent, runner.stock(workflow)) <= TOLERANCE


def test_the_example_has_everything_ready_before_it_samples(runner: Runner) -> None:
    nodes = example(runner, "sd15-warm-up-vae-blade", seed=8010)
    nodes[node_id(nodes, "BladeOptimizeModel")]["inputs"]["backend"] = "auto"
    nodes[node_id(nodes, "BladeWarmUp")]["inputs"]["sizes"] = "64x64, 40x88"
    run = runner.ok(nodes)
    sizes = run.text("BladeWarmUp").splitlines()[:2]
    assert [size.split(",")[0] for size in sizes] == ["64x64", "40x88"]
    assert run.counted["blocks_eager"] == 0
    assert difference(run.latent, runner.ok(as_stock(nodes)).latent) <= TOLERANCE

    latent = nodes[node_id(nodes, "EmptyLatentImage")]["inputs"]
    latent["width"], latent["height"] = 40, 88
    later = runner.ok(nodes)
    assert later.counted["graphs_compiled"] == later.counted["blocks_eager"] == 0
    assert difference(later.latent, runner.ok(as_stock(nodes)).latent) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("sizes", "512x500", "sizes has '512x500'; expected WIDTHxHEIGHT in pixels"),
        ("batch_sizes", "two", "batch_sizes has 'two'; expected whole numbers"),
    ],
)
def test_what_is_no_size_stops_the_prompt_by_name(
    runner: Runner, name: str, value: str, said: str
) -> None:
    run = runner.run(warmed(runner, **{name: value}))
    assert run.result.status == "error" and run.result.error is not None
    assert run.result.error["node_type"] == "BladeWarmUp"
    assert str(run.result.error["exception_message"]).startswith(said)
    assert not any(run.counted.values())


def test_graphs_on_disk_and_in_memory_are_cleared(
    server_factory: ServerFactory,
    models: dict[str, Path],
    graph_store: dict[str, str],
    tmp_path: Path,
) -> None:
    variables = graph_store | {"BLADE_CACHE_DIR": str(tmp_path)}
    with server_factory("clear", variables=variables) as server:
        runner = Runner(server, models)
        first = runner.ok(Text2Image(seed=8100))
        graphs = int(first.counted["graphs_compiled"])
        assert len(list(tmp_path.iterdir())) == graphs > 0
        nodes = {"1": {"class_type": "BladeClearCache", "inputs": {"disk": False, "memory": True}}}
        assert runner.run(nodes).text("BladeClearCache") == f"{graphs} graphs deleted from memory."
        assert runner.ok(Text2Image(seed=8101)).counted["graphs_loaded"] == graphs
        nodes["1"]["inputs"] = {"disk": True, "memory": True}
        assert f"{graphs} graphs (" in runner.run(nodes).text("BladeClearCache")
        assert list(tmp_path.iterdir()) == []
        assert runner.ok(Text2Image(seed=8102)).counted["graphs_compiled"] == graphs
