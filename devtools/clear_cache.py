"""Delete Blade's compiled graphs on disk. Run by `dev.py clear-cache` inside the environment."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder's "server" and the checkout's "nodes" must not hide ComfyUI's.
    del sys.path[0]
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from devtools import ROOT
from devtools.pack import register_package


def main() -> int:
    """Say what was deleted, and from where."""
    register_package("blade", ROOT)
    from blade.blade_core.config import store_folder
    from blade.blade_core.counters import Counters
    from blade.blade_core.store import GraphStore

    store = GraphStore(store_folder(), 0, Counters())
    print(f"{store.clear()} deleted from {store.folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
