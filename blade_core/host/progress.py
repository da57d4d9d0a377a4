"""Compilation as the user sees it: a bar and a line of text on the Blade node."""

from __future__ import annotations

import sys
import time

import comfy.utils
from comfy_execution.progress import get_progress_state

from ..key import GraphKey


class CompileProgress:
    """Progress of one run; silent until something is compiled.

    first: what the user waits for.
    """

    def __init__(self, node_id: str | None, first: str = "first step") -> None:
        self._node_id, self._first = node_id, first
        self._bar: comfy.utils.ProgressBar | None = None
        self._start = 0.0
        self._graphs = 0
        self._beside = 0

    def beside(self) -> None:
        """One more graph is left to another process, while sampling goes on."""
        self._beside += 1
        text = f"{self._beside} graphs being compiled beside sampling, which is not faster yet"
        say(text, self._node_id)

    def compiling(self, key: GraphKey, done: int, total: int) -> None:
        """`done` of `total` units have their graph; that of `key` is compiled or loaded now."""
        if self._bar is None:
            self._start = time.perf_counter()
            self._bar = comfy.utils.ProgressBar(total, node_id=self._node_id)
        self._graphs += 1
        self._bar.update_absolute(done, total)
        seconds = time.perf_counter() - self._start
        # Short enough for one line of a node at its default width.
        say(f"{done + 1}/{total} {key.label}, {seconds:.0f} s", self._node_id)

    def stock(self, why: str) -> None:
        """All of it runs as without Blade."""
        say(f"runs as stock: {why}", self._node_id)

    def finish(self, pending: bool) -> None:
        """At the end of a call: say what is ready, and take the bar off the node.

        pending: graphs of this call are still being compiled elsewhere.
        """
        if self._beside and not pending:
            say(f"{self._beside} graphs compiled", self._node_id)
            self._beside = 0
        if self._bar is None:
            return
        self._bar = None
        seconds = time.perf_counter() - self._start
        say(f"{self._graphs} graphs ready, {self._first} {seconds:.0f} s", self._node_id)
        if self._node_id is not None:
            get_progress_state().finish_progress(self._node_id)


def say(text: str, node_id: str | None) -> None:
    """Show `text` on the node, if a server with users is running."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    if instance is not None and node_id is not None:
        instance.send_progress_text(text, node_id)
