"""Developer tooling: environment, host, fixtures, test server and demo. Not part of the pack."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

WORK = ROOT / ".dev"
"""Git-ignored folder for everything the tooling downloads or produces."""


class DevError(RuntimeError):
    """A problem the developer can act on: says what failed, what was seen and what to do."""
