"""The example workflows with the real compiler: `auto` finds Inductor here."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
from blade_tests.server.conftest import ServerFactory
from blade_tests.server.workflow import TOLERANCE, Run, Runner, difference
from PIL import Image

from devtools.client import Workflow
from devtools.workflows import load_workflow, node_id

WIDTH, HEIGHT = 128, 64


@dataclass(frozen=True)
class Pair:
    """An architecture's two example workflows, run."""

    architecture: str
    stock: Run
    blade: Run

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """What Blade says of the UNet, which is the newest that it knows."""
        return list(self.blade.stats["models"][-1]["blocks"])


@pytest.fixture(scope="module")
def runner(
    server_factory: ServerFactory,
    models: dict[str, Path],
    inductor_cache: dict[str, str],
    graph_store: dict[str, str],
) -> Iterator[Runner]:
    """A server of its own, for it keeps SDXL in memory; its graphs are for test_restart.py."""
    with server_factory("images", variables=inductor_cache | graph_store) as server:
        yield Runner(server, models)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pair(request: pytest.FixtureRequest, runner: Runner) -> Pair:
    stock, blade = (runner.ok(example(runner, request.param, kind)) for kind in ("stock", "blade"))
    return Pair(request.param, stock, blade)


def example(runner: Runner, architecture: str, kind: str, seed: int = 3000) -> Workflow:
    """The workflow as it ships, but for the file, the size and the number of steps."""
    return load_workflow(
        f"{architecture}-txt2img-{kind}",
        checkpoint=runner.models[architecture].name,
        width=WIDTH,
        height=HEIGHT,
        steps=2,
        seed=seed,
    )


def test_images_come_out(pair: Pair, runner: Runner) -> None:
    pictures = []
    for run in (pair.stock, pair.blade):
        (file,) = run.result.files()
        with Image.open(io.BytesIO(runner.client.view(**file))) as image:
            assert (image.format, image.size) == ("PNG", (WIDTH, HEIGHT))
            pictures.append(numpy.asarray(image.convert("RGB"), dtype=float))
    assert pictures[0].std() > 1, "the picture is one flat colour"
    assert abs(pictures[0] - pictures[1]).max() <= 1, "more than rounding between the pictures"


def test_latents_equal_stock(pair: Pair) -> None:
    assert difference(pair.blade.latent, pair.stock.latent) <= TOLERANCE


def test_every_block_is_compiled(pair: Pair) -> None:
    assert not any(pair.stock.counted.values())
    counted, blocks = pair.blade.counted, pair.blocks
    assert {block["state"] for block in blocks} == {"compiled"}
    assert not any(block["reasons"] for block in blocks)
    assert counted["blocks_compiled"] == len(blocks) > 0
    assert counted["blocks_eager"] == counted["compile_failures"] == 0
    assert counted["graphs_compiled"] == len(pair.blade.new_keys) > 0
    assert all(" | inductor | " in key for key in pair.blade.new_keys)


def test_report_tells_of_it(pair: Pair) -> None:
    report = pair.blade.text("BladeReport")
    total = pair.blade.stats["counters"]["graphs_compiled"]
    assert f"graphs compiled {total} in " in report
    assert f"{len(pair.blocks)} blocks: {len(pair.blocks)} compiled" in report
    assert "(backend auto: inductor; on_failure fallback)" in report
    assert "eager" not in report


def test_progress_is_shown_while_compiling(pair: Pair) -> None:
    events = pair.blade.result.of_kind("progress_text")
    node = node_id(pair.blade.nodes, "BladeOptimizeModel")
    assert {event.data["node"] for event in events} == {node}
    *texts, last = pair.blade.result.progress_texts()
    layers = sum(len(block["layers"]) for block in pair.blocks)
    line = re.compile(rf"(\d+)/{layers} (.+), \d+ s")
    matches = [line.fullmatch(text) for text in texts]
    found = [match.groups() for match in matches if match]
    assert len(found) == len(texts), texts
    new_labels = [key.split(" | ")[0] for key in pair.blade.new_keys]
    assert sorted(label for _, label in found) == sorted(new_labels)
    numbers = [int(number) for number, _ in found]
    assert numbers == sorted(set(numbers)) and numbers[-1] <= layers
    assert re.fullmatch(rf"{len(new_labels)} graphs ready, first step \d+ s", last)
    # They come while it compiles, not all of them afterwards.
    assert events[-1].at - events[0].at > 0.5 * pair.blade.counted["compile_seconds"]


def test_next_seed_compiles_nothing_and_says_nothing(pair: Pair, runner: Runner) -> None:
    run = runner.ok(example(runner, pair.architecture, "blade", seed=3001))
    assert run.counted["graphs_compiled"] == run.counted["blocks_eager"] == 0
    assert run.result.progress_texts() == []
    stock = runner.ok(example(runner, pair.architecture, "stock", seed=3001))
    assert difference(run.latent, stock.latent) <= TOLERANCE


def test_torch_blade_falls_back_to_inductor(pair: Pair, runner: Runner) -> None:
    nodes = example(runner, pair.architecture, "blade", seed=3002)
    nodes[node_id(nodes, "BladeOptimizeModel")]["inputs"]["backend"] = "torch_blade"
    run = runner.ok(nodes)
    assert run.counted["graphs_compiled"] == run.counted["blocks_eager"] == 0
    assert run.counted["blocks_compiled"] == len(pair.blocks)
    warning = (
        'Blade cannot use backend "torch_blade" here. torch_blade: torch_blade is not installed. '
        "Blade uses inductor instead."
    )
    assert runner.server.log_text().count(warning) == 1
    stock = runner.ok(example(runner, pair.architecture, "stock", seed=3002))
    assert difference(run.latent, stock.latent) <= TOLERANCE
