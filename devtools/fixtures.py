"""Random-weight model files for tests and the demo, in the formats the host really loads."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from devtools import WORK, DevError
from devtools.base_directory import place_file
from devtools.host import default_host_path

_MAKER = Path(__file__).with_name("fixture_weights.py")
_FOLDERS = {
    "sd15": "checkpoints",
    "sd15-b": "checkpoints",
    "sd15-full": "checkpoints",
    "sdxl": "checkpoints",
    "sdxl-full": "checkpoints",
    "sd15-lora": "loras",
    "sd15-control": "controlnet",
    "sd15-control-b": "controlnet",
    "sdxl-control": "controlnet",
    "vae": "vae",
}


def fixture_names() -> list[str]:
    """All names `make_fixtures` knows."""
    return list(_FOLDERS)


def make_fixtures(
    root: Path, names: Iterable[str], *, full: bool = False, host: Path | None = None
) -> dict[str, Path]:
    """Put the named model files into the base directory `root`; return name to file.

    Files are made once and cached. `full` takes the real sizes of `sd15` and `sdxl` instead of
    the small ones. `host` is the ComfyUI whose classes give the shapes.
    """
    host = host or Path(os.environ.get("BLADE_COMFY") or default_host_path())
    placed: dict[str, Path] = {}
    for name in names:
        variant = f"{name}-full" if full and f"{name}-full" in _FOLDERS else name
        if variant not in _FOLDERS:
            raise DevError(f"No fixture {name!r}. Known: {', '.join(_FOLDERS)}.")
        target = root / "models" / _FOLDERS[variant] / f"blade-{variant}.safetensors"
        place_file(_cached(variant, host), target)
        placed[name] = target
    return placed


def _cached(name: str, host: Path) -> Path:
    """The cached file of a fixture; a changed maker gives new files."""
    stamp = hashlib.sha256(_MAKER.read_bytes()).hexdigest()[:10]
    file = WORK / "fixtures" / stamp / f"{name}.safetensors"
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"Writing the random-weight fixture {name} ...", flush=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    result = subprocess.run(
        [sys.executable, str(_MAKER), str(host), name, str(part)], capture_output=True, text=True
    )
    if result.returncode != 0 or not part.is_file():
        part.unlink(missing_ok=True)
        raise DevError(
            f"Writing the fixture {name} failed (exit {result.returncode}):\n"
            f"{result.stderr.strip()[-3000:]}\n"
            f"It was made with {sys.executable} and the host {host}: check that they fit."
        )
    part.replace(file)
    return file
