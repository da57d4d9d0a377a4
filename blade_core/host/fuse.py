"""BladeFusedLoRA's work: any number of LoRAs as one patch for each weight."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.utils
from comfy.model_patcher import ModelPatcher

from ..config import ON_FAILURE, check_choice
from ..errors import LoraError
from ..log import logger
from .adapters import FusedDelta, Part, parts_of, scaled
from .lora_file import LoraFile
from .lora_library import LoraLibrary
from .lora_parts import Lora, Targets
from .patcher import FUSED, switch_in_place
from .progress import say

_READERS = 4
"""Files that are read beside each other."""

_NAMED = 5
"""How many weights a message names."""


@dataclass(frozen=True)
class Row:
    """One LoRA as a user chose it."""

    name: str
    strength_model: float
    strength_clip: float

    def __post_init__(self) -> None:
        for strength in (self.strength_model, self.strength_clip):
            if not math.isfinite(strength):
                raise LoraError(
                    f"A strength of the LoRA {self.name!r} is {strength}; expected a finite number."
                )

    @classmethod
    def of_stack(cls, stack: Any) -> list[Row]:
        """The rows of a LORA_STACK in use.

        Raises:
            LoraError: it is no list of (name, strength for the model, strength for the clip), or
                one of these is not finite.
        """
        try:
            rows = [cls(str(n), float(model), float(clip)) for n, model, clip in stack or ()]
        except (TypeError, ValueError) as error:
            raise LoraError(
                f"lora_stack holds {str(stack)[:200]}; expected a list of (file name, model "
                "strength, clip strength). Wire the lora_stack of a LoRA stack node."
            ) from error
        return [row for row in rows if row.active]

    @property
    def active(self) -> bool:
        return self.name not in ("", "None") and bool(self.strength_model or self.strength_clip)

    @property
    def stack_entry(self) -> tuple[str, float, float]:
        """As LORA_STACK holds it, which other packs make and take, too."""
        return self.name, self.strength_model, self.strength_clip


@dataclass
class Fused:
    """What BladeFusedLoRA left on a clone: for the report, and for the next such node.

    stacks: what these nodes handed on, all of which is on this clone; one that begins with another
    stands for both. switch_ms: of the last writing of weights.
    """

    stacks: tuple[tuple[Row, ...], ...] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    weights: int = 0
    fuse_ms: float = 0.0
    switch_ms: float | None = None

    def report(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "weights": self.weights,
            "fuse_ms": round(self.fuse_ms, 1),
            "switch_ms": None if self.switch_ms is None else round(self.switch_ms, 1),
        }


@dataclass
class _Component:
    """A MODEL or a CLIP; they get the same files, at strengths of their own."""

    whole: Any
    targets: Targets
    strength: Callable[[Row], float]

    @property
    def fused(self) -> Fused:
        return _patcher(self.whole).attachments.get(FUSED) or Fused()


def fuse_loras(
    library: LoraLibrary,
    model: ModelPatcher,
    clip: Any,
    stack: Sequence[Row],
    rows: Sequence[Row],
    *,
    on_failure: str,
    node_id: str | None = None,
) -> tuple[ModelPatcher, Any]:
    """Return clones of `model` and `clip` (or None) with the LoRAs of `stack`, then `rows`.

    What is a mere sum becomes one patch for each weight, joined with that of a node before; a
    stack that the incoming clone has already is not applied again. Everything else stays the
    host's own patch, in its place.

    Raises:
        LoraError: a file is missing, unreadable or for other models; or, if `on_failure` is
            `error`, some of it cannot be used.
        InvalidChoice: `on_failure` is unknown.
    """
    check_choice("on_failure", on_failure, ON_FAILURE)
    start = time.perf_counter()
    components = [_Component(model, library.unet_targets(model), _of_model)]
    if clip is not None:
        targets = library.clip_targets(clip.patcher)
        components.append(_Component(clip, targets, _of_clip))
    added = [[*_not_there_yet(component, stack), *rows] for component in components]
    wanted = [[r for r in new if c.strength(r)] for c, new in zip(components, added, strict=True)]
    files = _read(library, components, wanted, node_id)
    reports = {row: _report(row, files[row], components) for row in files}
    _complain(reports, strict=on_failure == "error")
    fused = [
        _patched(component, chosen, {row: (files[row][0], files[row][1][n]) for row in chosen})
        for n, (component, chosen) in enumerate(zip(components, wanted, strict=True))
    ]
    milliseconds = (time.perf_counter() - start) * 1e3
    for component, clone, chosen in zip(components, fused, added, strict=True):
        if chosen:
            handed_on = (*stack, *rows)
            _leave_report(clone, component, chosen, handed_on, reports, milliseconds)
    return fused[0], fused[1] if clip is not None else None


def _of_model(row: Row) -> float:
    return row.strength_model


def _of_clip(row: Row) -> float:
    return row.strength_clip


def _not_there_yet(component: _Component, stack: Sequence[Row]) -> list[Row]:
    """`stack` without what came with the clone from the nodes before: all of a stack that one of
    them handed on, its beginning where another node has extended it since, or more; and what other
    nodes handed on if that follows."""
    left, known, count = tuple(stack), list(component.fused.stacks), _shared
    while known:
        shared, number = max((count(left, there), n) for n, there in enumerate(known))
        if not shared:
            break
        left, count = left[shared:], _whole
        del known[number]
    return list(left)


def _shared(asked: tuple[Row, ...], there: tuple[Row, ...]) -> int:
    """How many rows they have in common where one begins with all of the other."""
    count = min(len(asked), len(there))
    return count if asked[:count] == there[:count] else 0


def _whole(asked: tuple[Row, ...], there: tuple[Row, ...]) -> int:
    """How many rows they have in common where `asked` begins with all that is there."""
    return len(there) if asked[: len(there)] == there else 0


_Files = dict[Row, tuple[LoraFile, list[Lora]]]


def _read(
    library: LoraLibrary,
    components: Sequence[_Component],
    wanted: Iterable[list[Row]],
    node_id: str | None,
) -> _Files:
    rows = list(dict.fromkeys(row for chosen in wanted for row in chosen))
    files = {row: LoraFile.find(row.name) for row in rows}  # all of them, before any is read
    targets = [component.targets for component in components]
    new = [file for file in dict.fromkeys(files.values()) if not library.has(file, targets)]
    pinned = comfy.model_management.is_nvidia()

    def read(file: LoraFile) -> list[Lora]:
        return library.get(file, targets, pinned=pinned)

    loras = {file: read(file) for file in files.values() if file not in new}
    if new:
        bar = comfy.utils.ProgressBar(len(new), node_id=node_id)
        say(f"reading {len(new)} LoRAs", node_id)
        with ThreadPoolExecutor(_READERS) as pool:
            for file, found in zip(new, pool.map(read, new), strict=True):
                loras[file] = found
                bar.update(1)
        say(f"{len(new)} LoRAs read", node_id)
    return {row: (file, loras[file]) for row, file in files.items()}


def _report(
    row: Row, found: tuple[LoraFile, list[Lora]], components: Sequence[_Component]
) -> dict[str, Any]:
    loras = found[1]
    ranks = set().union(*(lora.ranks for lora in loras))
    kinds = sum((lora.kinds for lora in loras[1:]), loras[0].kinds)
    return {
        "name": row.name,
        "strength_model": row.strength_model,
        "strength_clip": row.strength_clip,
        "ranks": [min(ranks), max(ranks)] if ranks else None,
        "kinds": dict(kinds),
        "keys": sum(kinds.values()),
        "unmatched": sorted(set.intersection(*(lora.unmatched for lora in loras))),
        "skipped": [f"{key}: {why}" for lora in loras for key, why in lora.skipped.items()],
        "for": ["model", "clip"][: len(components)],
    }


def _complain(reports: dict[Row, dict[str, Any]], *, strict: bool) -> None:
    """Raise for what cannot be used at all, and say what is left out.

    Raises:
        LoraError: see `fuse_loras`.
    """
    for report in reports.values():
        name, skipped = report["name"], report["skipped"]
        if not report["keys"]:
            if not skipped and report["for"] == ["model"] and _is_text(report["unmatched"]):
                message = f"The LoRA {name!r} changes text encoders only, and no clip is wired"
                if strict:
                    raise LoraError(f"{message}. Wire it, or switch the row off.")
                logger.warning("%s: it changes nothing.", message)
                continue
            seen = _some([*skipped, *report["unmatched"]]) or "no tensors at all"
            what = " or ".join(report["for"])
            raise LoraError(
                f"Nothing in the LoRA {name!r} fits this {what}. It holds {seen}; expected were "
                "names of this model's own layers, as kohya, diffusers or ComfyUI write them. "
                "It was probably made for another architecture: choose one for this model."
            )
        if skipped:
            message = f"Part of the LoRA {name!r} cannot be used: {_some(skipped)}"
            if strict:
                raise LoraError(
                    f"{message}. Use a sound file, or set on_failure to fallback to go on "
                    "without these weights."
                )
            logger.warning("%s. It is applied without these weights.", message)
        if report["unmatched"] and report["keys"]:
            logger.info("LoRA %s: not used: %s", name, _some(report["unmatched"]))


def _is_text(names: Sequence[str]) -> bool:
    """Whether a file's tensors are all of text encoders, as kohya, diffusers or ComfyUI say it."""
    return bool(names) and all(name.startswith(("lora_te", "text_encoder")) for name in names)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _patched(
    component: _Component, rows: Sequence[Row], found: dict[Row, tuple[LoraFile, Lora]]
) -> Any:
    """A clone with the LoRAs of `rows` on it. Without any it is a clone too, so that a switch to
    none is done in place as any other."""
    active = [(*found[row], component.strength(row)) for row in rows]
    clone = component.whole.clone()
    patcher = _patcher(clone)
    switch_in_place(patcher)
    if not active:
        return clone
    before = patcher.patches_uuid
    _add(patcher, [lora for _, lora, _ in active], [strength for *_, strength in active])
    # The same LoRAs on the same model are the same weights, whichever node fused them.
    content = [(file, strength) for file, _, strength in active]
    patcher.patches_uuid = uuid.uuid5(before, repr((content, component.targets.digest)))
    return clone


def _leave_report(
    clone: Any,
    component: _Component,
    rows: Sequence[Row],
    handed_on: tuple[Row, ...],
    reports: dict[Row, dict[str, Any]],
    milliseconds: float,
) -> None:
    patcher, before = _patcher(clone), component.fused
    after = Fused(
        stacks=(*(s for s in before.stacks if handed_on[: len(s)] != s), handed_on),
        rows=[*before.rows, *(reports[row] for row in rows if row in reports)],
        weights=len(patcher.patches),
        fuse_ms=before.fuse_ms + milliseconds,
    )
    patcher.set_attachments(FUSED, after)


def _patcher(whole: Any) -> ModelPatcher:
    """The patcher of a MODEL, which it is itself, or of a CLIP."""
    patcher: ModelPatcher = getattr(whole, "patcher", whole)
    return patcher


def _add(patcher: ModelPatcher, loras: Sequence[Lora], strengths: Sequence[float]) -> None:
    """Register the patches, in order: sums that follow each other are one, also with one that a
    Blade node before has left."""
    sums: dict[str, list[Part]] = {}
    for lora, strength in zip(loras, strengths, strict=True):
        for key, part in lora.parts.items():
            sums.setdefault(key, []).append(scaled(part, strength))
        if lora.others:
            closed = {key if isinstance(key, str) else key[0] for key in lora.others}
            _add_sums(patcher, {key: sums.pop(key) for key in closed if key in sums})
            patcher.add_patches(lora.others, strength)
    _add_sums(patcher, sums)


def _add_sums(patcher: ModelPatcher, sums: dict[str, list[Part]]) -> None:
    """What the host's add_patches does, but for asking for the model's names once more, which
    takes longer than all else here: these are names of its weights."""
    for key, parts in sums.items():
        there = patcher.patches.get(key, [])
        joined = parts_of(there[-1:]) if there and type(there[-1][1]) is FusedDelta else None
        if joined is not None:
            there, parts = there[:-1], [*joined, *parts]
        patch = (1.0, FusedDelta(set(), tuple(parts)), 1.0, None, None)
        patcher.patches[key] = [*there, patch]
