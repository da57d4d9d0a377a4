"""Models, LoRA files, and the folders in which ComfyUI finds them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import torch
from blade_tests.host.fused_lora.inputs import Inputs
from blade_tests.host.lora_files import SMALL, make, make_clip
from blade_tests.host.tiny import make_model


@pytest.fixture
def small() -> Any:
    return make_model(SMALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of unlike kinds for a model and its text encoder: their folder."""
    folder, both = tmp_path_factory.mktemp("loras"), (make_model(SMALL), make_clip())
    make(*both, ranks=(4, 32), dtype=torch.float16, seed=1).save(folder, "lora")
    make(*both, kinds=("lokr", "diff", "bias"), seed=2).save(folder, "kron")
    make(*both, kinds=("loha", "norm"), seed=3).save(folder, "loha")
    make(*both, kinds=("dora",), only="attn", seed=4).save(folder, "dora")
    make(*both, only="attn2", seed=5).save(folder, "few")
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of this test's own; ComfyUI's are this one and the files above."""
    folders = ([str(made), str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", folders)
    yield tmp_path
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Inputs]]:
    folder = tmp_path_factory.mktemp("loras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {""}))
        yield folder, Inputs(make_model(SMALL), folder)
    comfy.model_management.unload_all_models()


@pytest.fixture
def folder(shared: tuple[Path, Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ComfyUI's for this test alone, beside that of the sound file."""
    own = tmp_path / "loras"
    own.mkdir()
    folders = ([str(own), str(shared[0])], folder_paths.supported_pt_extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", folders)
    return own


@pytest.fixture
def inputs(shared: tuple[Path, Inputs], folder: Path) -> Inputs:
    return shared[1]
