"""The one logger of the pack, and a way to say a thing once."""

from __future__ import annotations

import logging

logger = logging.getLogger("blade")

_said: set[str] = set()


def warn_once(message: str) -> None:
    """Log `message` as a warning the first time; a step that falls back must not flood the log."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def forget_said() -> None:
    """Let every message be said again."""
    _said.clear()
