"""BladeOptimizeVAE on a real server, with a VAE of the usual size."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy
import pytest
from blade_tests.server.workflow import TOLERANCE, Builder, Run, Runner, Text2Image, difference
from PIL import Image

from devtools.client import Workflow
from devtools.fixtures import make_fixtures
from devtools.workflows import node_id

SEEDS = itertools.count(9000)
DIALS: dict[str, Any] = {
    "backend": "eager",
    "freeze_weights": False,
    "on_failure": "error",
    "enabled": True,
}


@pytest.fixture(scope="module")
def vae(base_directory: Path, host_path: Path) -> str:
    """The file's name, for the loader."""
    return make_fixtures(base_directory, ["vae"], host=host_path)["vae"].name


def workflow(
    runner: Runner, vae: str | None, seed: int, *, blade: bool, node: str = "VAEDecode", **more: Any
) -> Workflow:
    """Sample, decode and encode again.

    vae: a file, or None for the checkpoint's own, which is a TAESD here.
    node: what decodes; `more` are its inputs.
    """
    to = Builder()
    to.nodes = Text2Image(seed=seed, blades=(None,)).build(runner.models)
    loader = node_id(to.nodes, "CheckpointLoaderSimple")
    chosen: list[Any] = [loader, 2]
    if vae is not None:
        chosen = to.add("VAELoader", vae_name=vae)[0]
    if blade:
        chosen = to.add("BladeOptimizeVAE", vae=chosen, **DIALS)[0]
    samples = [node_id(to.nodes, "KSampler"), 0]
    image = to.add(node, samples=samples, vae=chosen, **more)
    to.add("SaveImage", images=image[0], filename_prefix="tests/image")
    latent = to.add("VAEEncode", pixels=image[0], vae=chosen)
    to.add("SaveLatent", samples=latent[0], filename_prefix="tests/latent")
    report = to.add("BladeReport", model=[loader, 0], after=latent[0])
    to.add("PreviewAny", source=report[0])
    return to.nodes


def picture(runner: Runner, run: Run) -> numpy.ndarray:
    (file,) = [file for file in run.result.files() if file["filename"].endswith(".png")]
    with Image.open(io.BytesIO(runner.client.view(**file))) as image:
        return numpy.asarray(image.convert("RGB"), dtype=float)


TILED = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}


@pytest.mark.parametrize(
    ("node", "more"), [("VAEDecode", {}), ("VAEDecodeTiled", TILED)], ids=["whole", "tiled"]
)
def test_image_and_latent_equal_stock(
    runner: Runner, vae: str, node: str, more: dict[str, Any]
) -> None:
    seed = next(SEEDS)
    stock = runner.run(workflow(runner, vae, seed, blade=False, node=node, **more))
    blade = runner.run(workflow(runner, vae, seed, blade=True, node=node, **more))
    assert stock.result.ok and blade.result.ok, blade.result.error
    assert stock.counted["vae_runs"] == 0 < 2 <= blade.counted["vae_runs"]
    assert blade.counted["blocks_eager"] == blade.counted["captures"] == 0
    expected, actual = picture(runner, stock), picture(runner, blade)
    assert expected.std() > 1, "the picture is one flat colour"
    assert abs(actual - expected).max() <= 1, "more than rounding between the pictures"
    for one, other in zip(blade.latents, stock.latents, strict=True):
        assert difference(one, other) <= TOLERANCE
    report = blade.text("PreviewAny")
    for name in ("VAE decoder", "VAE encoder"):
        assert f"{name} (backend eager: eager; on_failure error)" in report
    assert {state["model"] for state in blade.stats["vaes"]} == {"VAE decoder", "VAE encoder"}


def test_another_seed_compiles_nothing(runner: Runner, vae: str) -> None:
    runner.ok(workflow(runner, vae, next(SEEDS), blade=True))
    run = runner.ok(workflow(runner, vae, next(SEEDS), blade=True))
    assert run.counted["graphs_compiled"] == run.counted["blocks_eager"] == 0
    assert run.counted["vae_runs"] == 2


def test_other_kinds_of_vae_pass_through(runner: Runner) -> None:
    seed = next(SEEDS)
    stock = runner.run(workflow(runner, None, seed, blade=False))
    blade = runner.run(workflow(runner, None, seed, blade=True))
    assert stock.result.ok and blade.result.ok, blade.result.error
    assert blade.counted["vae_runs"] == 0
    assert (picture(runner, stock) == picture(runner, blade)).all()
    assert any("it holds a TAESD" in text for text in blade.result.progress_texts())
