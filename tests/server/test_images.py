"""The example workflows with the real compiler: `auto` finds Inductor here."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
from blade_tests.server.conftest import ServerFactory
from blade_tests.server.workflow import TOLERANCE, Blade, Run, Runner, difference
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


@pytest.fixture(scope="module")
def runner(
    server_factory: ServerFactory, models: dict[str, Path], inductor_cache: dict[str, str]
) -> Iterator[Runner]:
    """A server of its own, for it keeps SDXL in memory."""
    with server_factory("images", variables=inductor_cache) as server:
        yield Runner(server, models)


def example(runner: Runner, architecture: str, kind: str, seed: int = 3000) -> Workflow:
    return load_workflow(
        f"{architecture}-txt2img-{kind}",
        checkpoint=runner.models[architecture].name,
        width=WIDTH,
        height=HEIGHT,
        steps=2,
        seed=seed,
    )


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pair(request: pytest.FixtureRequest, runner: Runner) -> Pair:
    stock, blade = (runner.ok(example(runner, request.param, kind)) for kind in ("stock", "blade"))
    return Pair(request.param, stock, blade)


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
    counted, (model, *_) = pair.blade.counted, pair.blade.stats["models"][::-1]
    assert {block["state"] for block in model["blocks"]} == {"compiled"}
    assert not any(block["reasons"] for block in model["blocks"])
    assert counted["blocks_compiled"] == len(model["blocks"]) > 0
    assert counted["blocks_eager"] == counted["compile_failures"] == 0
    assert counted["graphs_compiled"] == len(pair.blade.new_keys) > 0
    assert all(" | inductor | " in key for key in pair.blade.new_keys)


def test_report_tells_of_it(pair: Pair) -> None:
    report = pair.blade.text("BladeReport")
    total = pair.blade.stats["counters"]["graphs_compiled"]
    blocks = int(pair.blade.counted["blocks_compiled"])
    assert report.startswith(f"graphs compiled {total} in ")
    assert f"{blocks} blocks: {blocks} compiled" in report
    assert "backend auto" in report
    assert "eager:" not in report


def test_progress_is_shown_while_compiling(pair: Pair) -> None:
    events = pair.blade.result.of_kind("progress_text")
    node = node_id(pair.blade.nodes, "BladeOptimizeModel")
    assert {event.data["node"] for event in events} == {node}
    *compiling, last = pair.blade.result.progress_texts()
    count = int(pair.blade.counted["graphs_compiled"])
    assert len(compiling) == count
    layers = sum(len(block["layers"]) for block in pair.blade.stats["models"][-1]["blocks"])
    done = []
    for text, key in zip(compiling, pair.blade.new_keys, strict=True):
        found = re.fullmatch(r"Compiling (.+) \((\d+) of (\d+) layers, \d+ s\)", text)
        assert found, text
        assert int(found[3]) == layers
        done.append(int(found[2]))
    assert done == sorted(set(done)) and done[-1] <= layers
    assert re.fullmatch(rf"Compiled {count} graphs in \d+ s", last)
    # While it compiles, not all at the end.
    assert events[-1].at - events[0].at > 0.5 * pair.blade.counted["compile_seconds"] * (
        (count - 1) / count
    )
