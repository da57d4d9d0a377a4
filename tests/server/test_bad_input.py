"""Wrong inputs, models that are no UNet, and machines that cannot compile."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from blade_tests.server.conftest import ServerFactory
from blade_tests.server.workflow import (
    TOLERANCE,
    Blade,
    Run,
    Runner,
    Text2Image,
    difference,
)
from safetensors.numpy import save_file

from devtools.client import PromptRejected
from devtools.workflows import node_id

PLAIN = Text2Image(seed=5000)
NO_TORCH_BLADE = "torch_blade: torch_blade is not installed"
CXX = "no-such-compiler"


def rejected(runner: Runner, nodes: dict[str, Any]) -> dict[str, Any]:
    """Post a workflow that the server has to refuse; return the Blade node's one error."""
    with pytest.raises(PromptRejected) as caught:
        runner.client.queue(nodes, "tests")
    node = caught.value.node_errors[node_id(nodes, "BladeOptimizeModel")]
    assert node["class_type"] == "BladeOptimizeModel"
    (error,) = node["errors"]
    return dict(error)


def failed(run: Run) -> str:
    """The message of a run that failed in the Blade node, before anything was sampled."""
    assert run.result.status == "error"
    error = run.result.error
    assert error is not None
    assert error["node_type"] == "BladeOptimizeModel"
    assert error["exception_type"].endswith("BackendUnavailable")
    assert not any(run.counted.values())
    return str(error["exception_message"]).strip()


@pytest.mark.parametrize(
    ("blade", "name", "known"),
    [
        (Blade(backend="tensorrt"), "backend", ("auto", "torch_blade", "inductor", "eager")),
        (Blade(on_failure="ignore"), "on_failure", ("fallback", "error")),
    ],
    ids=["backend", "on_failure"],
)
def test_unknown_choice_is_refused(
    runner: Runner, blade: Blade, name: str, known: tuple[str, ...]
) -> None:
    error = rejected(runner, replace(PLAIN, blades=(blade,)).build(runner.models))
    assert error["type"] == "value_not_in_list"
    assert error["extra_info"]["input_name"] == name
    assert all(f"'{value}'" in error["details"] for value in (getattr(blade, name), *known))


def test_missing_model_is_refused(runner: Runner) -> None:
    nodes = PLAIN.build(runner.models)
    del nodes[node_id(nodes, "BladeOptimizeModel")]["inputs"]["model"]
    error = rejected(runner, nodes)
    assert error["type"] == "required_input_missing"
    assert error["details"] == "model"


def test_something_else_than_a_model_is_refused(runner: Runner) -> None:
    nodes = PLAIN.build(runner.models)
    clip = [node_id(nodes, "CheckpointLoaderSimple"), 1]
    nodes[node_id(nodes, "BladeOptimizeModel")]["inputs"]["model"] = clip
    assert rejected(runner, nodes)["type"] == "return_type_mismatch"


def test_torch_blade_that_is_not_installed_is_an_error(runner: Runner) -> None:
    workflow = replace(PLAIN, blades=(Blade("torch_blade", on_failure="error"),))
    message = failed(runner.run(workflow))
    assert message == f'Blade cannot use backend "torch_blade" here. {NO_TORCH_BLADE}.'
    # The same workflow with another backend is fine: the server took no harm.
    run = runner.ok(PLAIN)
    assert difference(run.latent, runner.stock(PLAIN)) <= TOLERANCE


WIDTH, CONTEXT = 64, 768
# The smallest SD3 kind of model that the host detects, with SD1.5's width of prompts.
OTHER_MODEL = {
    "x_embedder.proj": (WIDTH, 16, 2, 2),
    "t_embedder.mlp.0": (WIDTH, 256),
    "t_embedder.mlp.2": (WIDTH, WIDTH),
    "y_embedder.mlp.0": (WIDTH, CONTEXT),
    "y_embedder.mlp.2": (WIDTH, WIDTH),
    "context_embedder": (WIDTH, CONTEXT),
    "joint_blocks.0.context_block.attn.qkv": (3 * WIDTH, WIDTH),
    "joint_blocks.0.context_block.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    "joint_blocks.0.x_block.attn.qkv": (3 * WIDTH, WIDTH),
    "joint_blocks.0.x_block.attn.proj": (WIDTH, WIDTH),
    "joint_blocks.0.x_block.mlp.fc1": (4 * WIDTH, WIDTH),
    "joint_blocks.0.x_block.mlp.fc2": (WIDTH, 4 * WIDTH),
    "joint_blocks.0.x_block.adaLN_modulation.1": (6 * WIDTH, WIDTH),
    "final_layer.linear": (64, WIDTH),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
}


@pytest.fixture(scope="module")
def other_model(base_directory: Path) -> str:
    """The file name of a diffusion model that Blade does not optimize."""
    tensors: dict[str, numpy.ndarray] = {"pos_embed": numpy.zeros((1, 64, WIDTH), numpy.float32)}
    for name, shape in OTHER_MODEL.items():
        generator = numpy.random.default_rng(zlib.crc32(name.encode()))
        values = generator.standard_normal(shape) / numpy.sqrt(numpy.prod(shape[1:]))
        tensors[f"{name}.weight"] = values.astype(numpy.float32)
        tensors[f"{name}.bias"] = numpy.full(shape[0], 0.01, numpy.float32)
    file = base_directory / "models" / "diffusion_models" / "blade-sd3.safetensors"
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file)
    return file.name


@pytest.mark.parametrize("on_failure", ["fallback", "error"])
def test_model_that_is_no_unet_passes_through(
    runner: Runner, other_model: str, on_failure: str
) -> None:
    workflow = replace(
        PLAIN,
        seed=5100,
        diffusion_model=other_model,
        blades=(Blade("auto", on_failure=on_failure),),
        report=True,
    )
    run = runner.ok(workflow)
    assert run.result.progress_texts() == [
        "Blade optimizes SD1.5 and SDXL kinds of UNet; this model is a SD3 "
        "(OpenAISignatureMMDITWrapper). It runs unchanged."
    ]
    assert "does not run through Blade Optimize Model" in run.text("BladeReport")
    assert not any(run.counted.values())
    assert numpy.array_equal(run.latent, runner.stock(workflow))


NO_COMPILER = f"inductor: no working C++ compiler was found (CXX is {CXX!r}): "


@pytest.fixture(scope="module")
def no_compiler(server_factory: ServerFactory, models: dict[str, Path]) -> Iterator[Runner]:
    """A server on a machine where Inductor finds no C++ compiler."""
    with server_factory("no-compiler", variables={"CXX": CXX}) as server:
        yield Runner(server, models)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("auto", f"{NO_TORCH_BLADE}; {NO_COMPILER}"),
        ("torch_blade", f"{NO_TORCH_BLADE}; {NO_COMPILER}"),
        ("inductor", NO_COMPILER),
    ],
    ids=["auto", "torch_blade", "inductor"],
)
def test_without_compiler_fallback_is_stock(no_compiler: Runner, backend: str, reason: str) -> None:
    blade = Blade(backend, on_failure="fallback")
    said = f'This model runs as stock: Blade cannot use backend "{backend}" here. {reason}'
    for seed in (5200, 5201):
        workflow = replace(PLAIN, seed=seed, steps=2, blades=(blade,), report=True)
        run = no_compiler.ok(workflow)
        assert numpy.array_equal(run.latent, no_compiler.stock(workflow))
        assert not any(run.counted.values())
        report = run.text("BladeReport")
        assert f'runs as stock: Blade cannot use backend "{backend}" here. {reason}' in report
    assert no_compiler.server.log_text().count(said) == 1


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("auto", f"{NO_TORCH_BLADE}; {NO_COMPILER}"), ("inductor", NO_COMPILER)],
    ids=["auto", "inductor"],
)
def test_without_compiler_error_stops_the_prompt(
    no_compiler: Runner, backend: str, reason: str
) -> None:
    workflow = replace(PLAIN, seed=5300, blades=(Blade(backend, on_failure="error"),))
    message = failed(no_compiler.run(workflow))
    assert message.startswith(f'Blade cannot use backend "{backend}" here. {reason}')
    assert "Install g++ or clang" in message


def test_report_of_a_refused_model_does_not_say_that_it_has_not_run(no_compiler: Runner) -> None:
    blade = Blade("auto", on_failure="fallback")
    run = no_compiler.ok(replace(PLAIN, seed=5250, blades=(blade,), report=True))
    assert "runs as stock" in run.text("BladeReport")
    assert "not run yet" not in run.text("BladeReport")


def test_eager_needs_no_compiler(no_compiler: Runner) -> None:
    workflow = replace(PLAIN, seed=5400)
    run = no_compiler.ok(workflow)
    assert run.counted["blocks_compiled"] > 0
    assert difference(run.latent, no_compiler.stock(workflow)) <= TOLERANCE
