"""LoRA files: where they are, which version, and what is in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath, PureWindowsPath

import comfy.lora_convert
import comfy.utils
import folder_paths
import torch

from ..errors import LoraError, first_line, is_cancel, is_out_of_memory

Tensors = dict[str, torch.Tensor]


def lora_names() -> list[str]:
    """All files in ComfyUI's loras folders."""
    return list(folder_paths.get_filename_list("loras"))


def lora_versions(names: Sequence[str]) -> list[LoraFile | None]:
    """The files as they are now; None for what cannot be found."""
    found: list[LoraFile | None] = []
    for name in names:
        try:
            found.append(LoraFile.find(name))
        except (LoraError, OSError):
            found.append(None)
    return found


@dataclass(frozen=True)
class LoraFile:
    """A file as it is now: another time or size makes another one."""

    name: str
    path: str
    modified_ns: int
    size: int

    @classmethod
    def find(cls, name: str) -> LoraFile:
        """Find `name` in ComfyUI's loras folders.

        Raises:
            LoraError: there is no such file, or the name leads out of those folders.
        """
        path = PurePath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or _has_drive(name):
            raise LoraError(
                f"The LoRA name {name!r} leads out of ComfyUI's loras folders. "
                "Put the file into one of them and choose it there."
            )
        found = folder_paths.get_full_path("loras", name)
        if found is None:
            raise LoraError(
                f"There is no LoRA {name!r} in ComfyUI's loras folders. "
                "Choose another file, or switch this row off."
            )
        try:
            status = os.stat(found)
        except OSError as error:
            raise LoraError(f"The LoRA {name!r} cannot be read: {first_line(error)}") from error
        return cls(name, found, status.st_mtime_ns, status.st_size)

    def read(self) -> Tensors:
        """Read it as the host's own loader does: no code in it is ever run.

        Raises:
            LoraError: the file cannot be read, or is no dictionary of tensors.
        """
        try:
            tensors = comfy.utils.load_torch_file(self.path, safe_load=True)
            tensors = comfy.lora_convert.convert_lora(tensors)
            tensors = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        except Exception as error:  # whatever a reader of three formats raises
            if is_cancel(error) or is_out_of_memory(error):
                raise
            raise LoraError(
                f"The LoRA {self.name!r} cannot be read: {_reason(error)}. "
                "Expected a safetensors file, or a checkpoint of nothing but tensors. "
                "Download it again."
            ) from error
        return tensors


def _has_drive(name: str) -> bool:
    """A colon is a drive or a stream on Windows, and elsewhere a letter like others."""
    return bool(":" in name if os.name == "nt" else PureWindowsPath(name).drive)


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own text says how to run it anyway
        return "it is no pickle of plain tensors; code in such files is never run"
    return first_line(error).rstrip(".")
