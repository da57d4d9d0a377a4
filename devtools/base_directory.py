"""A ComfyUI base directory of our own, so that no run touches the user's ComfyUI folder."""

import os
import shutil
import subprocess
from pathlib import Path

from devtools import ROOT, DevError

_FOLDERS = (
    "custom_nodes",
    "input",
    "models/checkpoints",
    "models/controlnet",
    "models/loras",
    "models/vae",
    "output",
    "temp",
    "user",
)


def make_base_directory(path: Path, *, link_pack: bool = True) -> Path:
    """Create (or complete) a base directory at `path`, with this checkout as its only pack."""
    for name in _FOLDERS:
        (path / name).mkdir(parents=True, exist_ok=True)
    if link_pack:
        link_folder(path / "custom_nodes" / "blade", ROOT)
    return path.resolve()


def place_file(source: Path, target: Path) -> None:
    """Make `source` appear at `target`, with a copy only where the disk allows no link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target):
        if target.exists() and os.path.samefile(source, target):
            return
        target.unlink()
    for link in (os.link, os.symlink):
        try:
            link(source, target)
            return
        except OSError:
            continue
    shutil.copyfile(source, target)


def link_folder(link: Path, target: Path) -> None:
    """Make the folder `target` appear at `link`."""
    if link.exists() and os.path.samefile(link, target):
        return
    if os.path.lexists(link):
        raise DevError(
            f"{link} exists and is not a link to {target}.\n"
            "It stems from another checkout: move or delete it."
        )
    if os.name != "nt":
        link.symlink_to(target, target_is_directory=True)
        return
    # A junction needs no administrator rights, a symbolic link does.
    command = ["cmd", "/c", "mklink", "/J", str(link), str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise DevError(
            f"Could not make the junction {link} to {target}: {result.stderr.strip()}\n"
            "Junctions need both folders on a local NTFS disk."
        )
