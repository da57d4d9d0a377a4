"""BladeWarmUp's work: compile and record ahead what later prompts will need."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..errors import InvalidChoice
from ..log import logger
from . import model as host

_STEPS = 4
"""One as stock where other processes compile, one whose graphs are checked, one that shows what can
be recorded, and one that is."""

_CELL = 8
"""Pixels of an image for one of its latent, in each direction."""

_LARGEST = 16384  # the host's own limit of a side


def read_sizes(text: str) -> list[tuple[int, int]]:
    """Return (width, height) in pixels of each size in `text`, such as "512x512, 768x512".

    Raises:
        InvalidChoice: naming what is no size.
    """
    sizes = []
    for word in re.split(r"[,;\n]+", text):
        if not word.strip():
            continue
        found = re.fullmatch(r"\s*(\d+)\s*[xX\u00d7]\s*(\d+)\s*", word)
        size = (int(found[1]), int(found[2])) if found else None
        if size is None or any(n % _CELL or not 16 <= n <= _LARGEST for n in size):
            raise InvalidChoice(
                f"sizes has {word.strip()!r}; expected WIDTHxHEIGHT in pixels, each a multiple of "
                f"{_CELL} from 16 to {_LARGEST}, with commas between: 512x512, 768x512."
            )
        sizes.append(size)
    if not sizes:
        raise InvalidChoice("sizes is empty; expected for example 512x512, 768x512.")
    return list(dict.fromkeys(sizes))


def read_batches(text: str) -> list[int]:
    """Return the batch sizes in `text`, such as "1, 4".

    Raises:
        InvalidChoice: naming what is no batch size.
    """
    words = [word for word in re.split(r"[\s,;]+", text) if word]
    for word in words:
        if not word.isdecimal() or not 1 <= int(word) <= 4096:
            raise InvalidChoice(
                f"batch_sizes has {word!r}; expected whole numbers from 1 to 4096 with commas "
                "between: 1, 4."
            )
    if not words:
        raise InvalidChoice("batch_sizes is empty; expected for example 1, 4.")
    return list(dict.fromkeys(int(word) for word in words))


def warm_up(
    model: ModelPatcher,
    positive: Any,
    negative: Any,
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    cfg: float,
) -> list[str]:
    """Sample a few steps of each size and batch size, until no graph is left to be compiled, also
    where nobody waits for graphs otherwise; return a line on each.

    The images are thrown away; neither the model nor any random number generator is changed.
    """
    if not host.is_optimized(model):
        message = "Nothing to warm up: this model does not run through Blade Optimize Model."
        logger.warning(message)
        return [message]
    engine = host.session().engine
    counters = engine.counters
    channels = model.get_model_object("latent_format").latent_channels
    cases = list(product(sizes, batches))
    bar = comfy.utils.ProgressBar(len(cases))
    lines = []
    for (width, height), batch in cases:
        before, start = counters.snapshot(), time.perf_counter()
        latent = torch.zeros(batch, channels, height // _CELL, width // _CELL)
        pending = None
        while pending != counters["runs_pending"]:  # the last run did without some graphs
            pending = counters["runs_pending"]
            engine.jobs.finish(comfy.model_management.throw_exception_if_processing_interrupted)
            comfy.sample.sample(
                model,
                torch.zeros_like(latent),
                _STEPS,
                cfg,
                "euler",
                "normal",
                positive,
                negative,
                latent,
                disable_pbar=True,
            )
        after = counters.snapshot()
        compiled, loaded = (
            int(after[name] - before[name]) for name in ("graphs_compiled", "graphs_loaded")
        )
        lines.append(
            f"{width}x{height}, batch {batch}: {compiled} graphs compiled, {loaded} loaded, "
            f"{time.perf_counter() - start:.1f} s"
        )
        logger.info("warmed up %s", lines[-1])
        bar.update(1)
    return lines
