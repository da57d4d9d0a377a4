"""Builds the API-format workflows of the server tests and runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import load

from devtools.base_directory import place_file
from devtools.client import ComfyClient, Event, RunResult, Workflow
from devtools.fixture_images import make_control_images
from devtools.fixtures import make_fixtures
from devtools.server import ComfyServer
from devtools.workflows import load_workflow, node_id

Stats = dict[str, Any]

TOLERANCE = 1e-4
"""Relative RMS between a latent made with Blade and stock's, fp32 on the CPU."""
CLEAR = 100 * TOLERANCE
"""A change that nobody takes for rounding."""

CONTROLNETS = {
    "control_v11p_sd15_canny_fp16.safetensors": "sd15-control",
    "control_v11f1p_sd15_depth_fp16.safetensors": "sd15-control-b",
}
"""The examples' files, and which fixtures take their places."""
DIALS = ("backend", "freeze_weights", "on_failure", "enabled", "frozen_change", "compile")
"""What BladeControlNetApply takes and stock's node does not."""


class Node:
    """A node that was added; `node[1]` is its second output, for another node's input."""

    def __init__(self, id: str) -> None:
        self.id = id

    def __getitem__(self, output: int) -> list[Any]:
        return [self.id, output]


class Builder:
    """Collects nodes; `nodes` is what a server takes."""

    def __init__(self) -> None:
        self.nodes: Workflow = {}

    def add(self, class_type: str, **inputs: Any) -> Node:
        """Add a node; its id counts from 1 in the order of adding."""
        node = Node(str(len(self.nodes) + 1))
        self.nodes[node.id] = {"class_type": class_type, "inputs": inputs}
        return node


@dataclass(frozen=True)
class Blade:
    """The inputs of a BladeOptimizeModel node."""

    backend: str = "eager"
    on_failure: str = "error"
    freeze_weights: bool = False
    enabled: bool = True


@dataclass(frozen=True)
class Text2Image:
    """One text-to-image workflow, in what the tests vary.

    blades: one sampler, with its own latent, for each entry; None samples the stock model.
    lora_before, lora_after: strength of a LoraLoader before or after the Blade node; 0 adds none.
    area: width, height, x, y in pixels; an area for a second positive prompt.
    diffusion_model: file whose model takes the place of the checkpoint's.
    """

    checkpoint: str = "sd15"
    diffusion_model: str = ""
    blades: tuple[Blade | None, ...] = (Blade(),)
    lora_before: float = 0.0
    lora_after: float = 0.0
    control: bool = False
    freeu: bool = False
    prompt: str = "a lighthouse on a cliff"
    negative: str = "blurry"
    area: tuple[int, int, int, int] | None = None
    width: int = 64
    height: int = 64
    batch: int = 1
    seed: int = 1
    steps: int = 1
    cfg: float = 7.0
    sampler: str = "euler"
    image: bool = False
    report: bool = False

    @property
    def stock(self) -> Text2Image:
        """The same without Blade, and with nothing but the latent as output."""
        return replace(self, blades=(None,), image=False, report=False)

    def build(self, models: Mapping[str, Path]) -> Workflow:
        """The workflow in API format; `models` gives the files to the fixtures' names."""
        to = Builder()
        loader = to.add("CheckpointLoaderSimple", ckpt_name=models[self.checkpoint].name)
        model, clip = loader[0], loader[1]
        if self.diffusion_model:
            model = to.add("UNETLoader", unet_name=self.diffusion_model, weight_dtype="default")[0]
        if self.lora_before:
            model, clip = self._lora(to, models, model, clip, self.lora_before)
        conditioning = self._conditioning(to, models, clip)
        latent = to.add(
            "EmptyLatentImage", width=self.width, height=self.height, batch_size=self.batch
        )
        for blade in self.blades:
            self._sample(to, models, blade, model, loader, conditioning, latent)
        return to.nodes

    def _lora(
        self, to: Builder, models: Mapping[str, Path], model: Any, clip: Any, strength: float
    ) -> tuple[list[Any], list[Any]]:
        node = to.add(
            "LoraLoader",
            model=model,
            clip=clip,
            lora_name=models["sd15-lora"].name,
            strength_model=strength,
            strength_clip=strength,
        )
        return node[0], node[1]

    def _conditioning(
        self, to: Builder, models: Mapping[str, Path], clip: Any
    ) -> tuple[list[Any], list[Any]]:
        positive = to.add("CLIPTextEncode", text=self.prompt, clip=clip)[0]
        negative = to.add("CLIPTextEncode", text=self.negative, clip=clip)[0]
        if self.area is not None:
            width, height, x, y = self.area
            other = to.add("CLIPTextEncode", text="a ship", clip=clip)
            there = to.add(
                "ConditioningSetArea",
                conditioning=other[0],
                width=width,
                height=height,
                x=x,
                y=y,
                strength=1.0,
            )
            positive = to.add(
                "ConditioningCombine", conditioning_1=positive, conditioning_2=there[0]
            )[0]
        if self.control:
            net = to.add("ControlNetLoader", control_net_name=models["sd15-control"].name)
            hint = to.add(
                "EmptyImage", width=self.width, height=self.height, batch_size=1, color=0x3377BB
            )
            both = to.add(
                "ControlNetApplyAdvanced",
                positive=positive,
                negative=negative,
                control_net=net[0],
                image=hint[0],
                strength=0.8,
                start_percent=0.0,
                end_percent=1.0,
            )
            positive, negative = both[0], both[1]
        return positive, negative

    def _sample(
        self,
        to: Builder,
        models: Mapping[str, Path],
        blade: Blade | None,
        model: Any,
        loader: Node,
        conditioning: tuple[list[Any], list[Any]],
        latent: Node,
    ) -> None:
        if blade is not None:
            model = to.add(
                "BladeOptimizeModel",
                model=model,
                backend=blade.backend,
                freeze_weights=blade.freeze_weights,
                on_failure=blade.on_failure,
                enabled=blade.enabled,
            )[0]
        if self.lora_after:
            model, _ = self._lora(to, models, model, loader[1], self.lora_after)
        if self.freeu:
            model = to.add("FreeU", model=model, b1=1.1, b2=1.4, s1=0.9, s2=0.2)[0]
        samples = to.add(
            "KSampler",
            model=model,
            seed=self.seed,
            steps=self.steps,
            cfg=self.cfg,
            sampler_name=self.sampler,
            scheduler="normal",
            positive=conditioning[0],
            negative=conditioning[1],
            latent_image=latent[0],
            denoise=1.0,
        )
        to.add("SaveLatent", samples=samples[0], filename_prefix="tests/latent")
        if self.image:
            image = to.add("VAEDecode", samples=samples[0], vae=loader[2])
            to.add("SaveImage", images=image[0], filename_prefix="tests/image")
        if self.report:
            report = to.add("BladeReport", model=model, after=samples[0])
            to.add("PreviewAny", source=report[1])


@dataclass
class Run:
    """What became of a workflow, and how Blade's statistics moved."""

    nodes: Workflow
    result: RunResult
    latents: list[numpy.ndarray]
    counted: dict[str, float]
    """Counter to how far it moved."""
    new_keys: list[str]
    """Keys of the graphs that were not in the cache before."""
    stats: Stats = field(repr=False)
    """Blade's statistics afterwards."""

    @property
    def latent(self) -> numpy.ndarray:
        """The latent of a workflow with one sampler."""
        (latent,) = self.latents
        return latent

    def text(self, class_type: str) -> str:
        """What the one node of a class shows as text."""
        return str(self.result.outputs[node_id(self.nodes, class_type)]["text"][0])


class Runner:
    """Runs workflows on one server."""

    def __init__(self, server: ComfyServer, models: Mapping[str, Path]) -> None:
        self.server = server
        self.client = ComfyClient(server.url)
        self.models = models

    def stats(self) -> Stats:
        """What GET /blade/stats says now."""
        return dict(self.client.get_json("/blade/stats"))

    def run(
        self, workflow: Text2Image | Workflow, on_event: Callable[[Event], None] | None = None
    ) -> Run:
        """Run a workflow to its end; one that does not end well is the test's to judge."""
        nodes = workflow.build(self.models) if isinstance(workflow, Text2Image) else workflow
        before = self.stats()
        result = self.client.run(nodes, on_event, timeout=600.0)
        after = self.stats()
        counters, old_keys = before["counters"], set(before["cache"]["keys"])
        return Run(
            nodes,
            result,
            latents=self._latents(result),
            counted={name: now - counters[name] for name, now in after["counters"].items()},
            new_keys=[key for key in after["cache"]["keys"] if key not in old_keys],
            stats=after,
        )

    def ok(self, workflow: Text2Image | Workflow) -> Run:
        """Run a workflow that has to end well, and has to sample anew."""
        run = self.run(workflow)
        assert run.result.ok, f"{run.result.status}: {run.result.error}"
        # The host answers a workflow that it knows with what it kept, which would prove nothing.
        kept = {
            str(id)
            for event in run.result.of_kind("execution_cached")
            for id in event.data["nodes"]
        }
        samplers = {id for id, node in run.nodes.items() if node["class_type"] == "KSampler"}
        assert not kept & samplers, "the host took the latent from its cache: change the seed"
        return run

    def stock(self, workflow: Text2Image) -> numpy.ndarray:
        """The latent that stock makes of a workflow; Blade has no part in it."""
        run = self.ok(workflow.stock)
        assert not any(run.counted.values()), f"a stock run moved Blade's counters: {run.counted}"
        return run.latent

    def free(self) -> None:
        """Have the server forget all models, and wait until Blade has none left either."""
        self.client.free()
        deadline = time.monotonic() + 30
        while self.stats()["models"] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.stats()["models"], "something holds on to a UNet that the host let go"

    def _latents(self, result: RunResult) -> list[numpy.ndarray]:
        outputs = sorted(result.outputs.items(), key=lambda item: int(item[0]))
        files = [file for _, output in outputs for file in output.get("latents", [])]
        return [load(self.client.view(**file))["latent_tensor"] for file in files]


def difference(actual: numpy.ndarray, expected: numpy.ndarray) -> float:
    """Relative RMS; infinite where shapes differ or the latent is no picture at all."""
    if actual.shape != expected.shape or not numpy.isfinite(expected).all():
        return float("inf")
    error, reference = actual.astype("f8") - expected, expected.astype("f8")
    return float(numpy.sqrt(numpy.square(error).mean() / numpy.square(reference).mean()))


def example(runner: Runner, name: str, seed: int, steps: int = 1) -> Workflow:
    """An example as it ships, but for the checkpoint and what makes it long."""
    nodes = load_workflow(
        name,
        checkpoint=runner.models["sd15"].name,
        width=64,
        height=64,
        steps=steps,
        seed=seed,
        backend="eager",
    )
    samples = [node_id(nodes, "KSampler"), 0]
    inputs = {"samples": samples, "filename_prefix": "tests/latent"}
    nodes["99"] = {"class_type": "SaveLatent", "inputs": inputs}
    return nodes


def place_control_files(base: Path, host: Path) -> None:
    """Put what the examples with ControlNets load into the base directory, under their names."""
    fixtures = make_fixtures(base, CONTROLNETS.values(), host=host)
    for name, fixture in CONTROLNETS.items():
        place_file(fixtures[fixture], fixtures[fixture].with_name(name))
    make_control_images(base)


def as_stock(nodes: Workflow, loras: Mapping[str, float] | None = None) -> Workflow:
    """A workflow with stock nodes in the place of all Blade nodes.

    loras: file to strength, for the chain of loaders in the place of the LoRA nodes.
    """
    stock = deepcopy(nodes)
    for id, node in nodes.items():
        if node["class_type"] == "BladeControlNetApply":
            theirs = {k: v for k, v in node["inputs"].items() if k not in DIALS}
            stock[id] = {"class_type": "ControlNetApplyAdvanced", "inputs": theirs}
        elif "Blade" in node["class_type"]:
            del stock[id]
    checkpoint = node_id(nodes, "CheckpointLoaderSimple")
    model, clip = [checkpoint, 0], [checkpoint, 1]
    for number, (name, strength) in enumerate((loras or {}).items(), 100):
        inputs: dict[str, Any] = {"model": model, "clip": clip, "lora_name": name}
        inputs |= {"strength_model": strength, "strength_clip": strength}
        stock[str(number)] = {"class_type": "LoraLoader", "inputs": inputs}
        model, clip = [str(number), 0], [str(number), 1]
    for node in stock.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["model"] = model
        elif node["class_type"] == "CLIPTextEncode":
            node["inputs"]["clip"] = clip
        elif node["class_type"] == "VAEDecode":
            node["inputs"]["vae"] = [checkpoint, 2]
    return stock
