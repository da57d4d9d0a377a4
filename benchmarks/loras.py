"""LoRA files on disk, and what a model's weights must be with them."""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.loaders import Stack
from benchmarks.models import lora_targets, lora_tensors, unet_weights
from benchmarks.rows import Row
from benchmarks.scenarios import Scenario


class LoraFiles:
    """The folder of LoRA files that a run's processes share; each is made when first needed."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        import folder_paths

        folder.mkdir(exist_ok=True)
        folder_paths.add_model_folder_path("loras", str(folder), is_default=True)
        self._folder, self._device = folder, device

    def stack(self, scenario: Scenario, turn: int = 0) -> Stack:
        """The LoRAs after so many switches; no two turns have the same strength."""
        first = scenario.loras * (turn % 2) if scenario.kind in ("switch", "cold") else 0
        names = [self._made(scenario.model, first + row) for row in range(scenario.loras)]
        if scenario.kind == "cold" and turn:
            names = [self._linked(name, f"{scenario.name}-{turn}-{name}") for name in names]
        return [(name, round(1 - turn / 20, 2)) for name in names]

    def read_ms(self, stack: Stack) -> float:
        """How long it takes to read the files once, and nothing else."""
        files = [self._folder / name for name, _ in stack]
        buffer = memoryview(bytearray(max(file.stat().st_size for file in files)))
        start = time.perf_counter()
        for file in files:
            with file.open("rb", buffering=0) as stream:
                stream.readinto(buffer)
        return round((time.perf_counter() - start) * 1e3, 1)

    def check(self, model: Any, scenario: Scenario, stack: Stack) -> Row:
        """How far the loaded weights that the LoRAs change are from what the files say, in fp64.

        The base is made again from its seed, so that no system's backup of it is trusted.
        """
        actual = model.model.diffusion_model.state_dict()
        keys = lora_targets(scenario.model)
        error, total, touched = 0.0, 0.0, 0
        with ExitStack() as opened:
            files = [(opened.enter_context(self._open(name)), s) for name, s in stack]
            for name, base in unet_weights(scenario.model, self._device):
                if name not in keys:
                    continue
                expected = base.double()
                for file, strength in files:
                    up, down = (
                        file.get_tensor(f"{keys[name]}.lora_{part}.weight")
                        .to(self._device)
                        .double()
                        for part in ("up", "down")
                    )
                    product = up.flatten(1) @ down.flatten(1)
                    expected += strength * product.view_as(expected)
                error += float((actual[name].to(self._device) - expected).square().sum())
                total += float(expected.square().sum())
                touched += actual[name].nbytes
        return {
            "weights_rel_rms": float(f"{(error / total) ** 0.5:.3e}"),
            "touched_mib": round(touched / 2**20, 3),
        }

    def _made(self, model: str, seed: int) -> str:
        name = f"{model}-{seed}.safetensors"
        if not (self._folder / name).exists():
            from safetensors.torch import save_file

            part = self._folder / f"{name}.part"  # a worker may be ended while it writes
            save_file(lora_tensors(model, self._device, seed), part)
            part.replace(self._folder / name)
        return name

    def _linked(self, name: str, link: str) -> str:
        """The file under a name that no process has read: another file to all that cache them."""
        if not (self._folder / link).exists():
            os.link(self._folder / name, self._folder / link)
        return link

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        return safe_open(self._folder / name, framework="pt")
