"""What is measured. A scenario is its name: any size, batch and steps can be asked for."""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

DEFAULT_STEPS = 20
_IMAGE = re.compile(r"(sd15|sdxl)-(\d+)-b(\d+)(?:-s(\d+))?(?:-cn(\d+))?(?:-lora(\d+))?")
_VAE = re.compile(r"vae-(\d+)-b(\d+)")
_SWITCH = re.compile(r"lora-(switch|strength|cold)-(sd15|sdxl)-(\d+)")
_NATIVE = {"sd15": 512, "sdxl": 1024}

FORMS = """\
{sd15,sdxl}-SIZE-bBATCH[-sSTEPS][-cnCONTROLNETS][-loraLORAS]  a sampling run; with -s only images
vae-SIZE-bBATCH                                               one decode
lora-{switch,strength,cold}-{sd15,sdxl}-LORAS                 another LoRA stack, other strengths,
                                                              a stack whose files were never read
main, grid-{sd15,sdxl}, table-NAME, switches-{sd15,sdxl}, switches, vae    the groups of them"""

SWITCHES = ("switch", "strength", "cold")
"""The kinds of scenario that change the LoRAs of a model in use."""

TABLE_STEPS = (20, 50, 100)
TABLE_COLUMNS = {"": "none", "-lora2": "+2 LoRAs", "-cn1": "ControlNet"}
"""The published table: these steps, and what stands behind the scenario's name."""


@dataclass(frozen=True)
class Scenario:
    """One measurement. `size` is the image's edge in pixels; the latent's is an eighth."""

    name: str
    kind: str
    """`image`, `vae`, or one of SWITCHES."""
    model: str
    size: int
    batch: int = 1
    steps: int = DEFAULT_STEPS
    images_only: bool = False
    """Whether only whole images are timed, as for the published table."""
    controlnets: int = 0
    loras: int = 0
    cfg: float = 7.0
    tokens: int = 77

    @property
    def shape(self) -> tuple[str, str, int, int]:
        """What scenarios have in common that can share compiled graphs."""
        kind = "image" if self.kind in SWITCHES else self.kind
        return kind, self.model, self.size, self.batch

    @property
    def edge(self) -> int:
        """The latent's edge."""
        return self.size // 8

    def tiny(self) -> "Scenario":
        """The same on tiny models: every line runs on a CPU, no figure means anything."""
        small = {"size": 64, "batch": min(self.batch, 2), "steps": min(self.steps, 4)}
        return replace(self, model=self.model.replace("-full", "-dry"), **small)  # type: ignore[arg-type]


def parse(name: str) -> Scenario:
    """Return the scenario of a name.

    Raises:
        ValueError: no form fits the name.
    """
    if found := _IMAGE.fullmatch(name):
        model, size, batch, steps, controlnets, loras = found.groups()
        scenario = Scenario(
            name,
            "image",
            f"{model}-full",
            int(size),
            int(batch),
            steps=int(steps or DEFAULT_STEPS),
            images_only=steps is not None,
            controlnets=int(controlnets or 0),
            loras=int(loras or 0),
        )
    elif found := _VAE.fullmatch(name):
        scenario = Scenario(name, "vae", "vae-full", int(found[1]), int(found[2]))
    elif found := _SWITCH.fullmatch(name):
        kind, model, loras = found.groups()
        scenario = Scenario(name, kind, f"{model}-full", _NATIVE[model], loras=int(loras))
    else:
        raise ValueError(f"there is no scenario {name!r}; names have one of the forms\n{FORMS}")
    if scenario.size % 64 or not scenario.size or not scenario.batch or scenario.steps < 4:
        raise ValueError(f"{name!r}: sizes are multiples of 64, batches 1 or more, steps 4 or more")
    return scenario


def expand(names: str) -> list[Scenario]:
    """The scenarios of a comma list of names and groups, each once."""
    found = [part for name in names.split(",") for part in _group(name.strip())]
    return [parse(name) for name in dict.fromkeys(found)]


def _group(name: str) -> list[str]:
    if name.startswith("table-"):
        image = name.removeprefix("table-")
        return [f"{image}-s{steps}{more}" for more in TABLE_COLUMNS for steps in TABLE_STEPS]
    return _GROUPS.get(name, [name])


class Sweep(NamedTuple):
    """How a model's step grows, each with all else as usual."""

    batches: list[str]
    sizes: list[str]
    loras: list[str]

    def all(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys([*self.batches, *self.sizes, *self.loras]))


def sweep(model: str) -> Sweep:
    """The grid of a model: batches at its own size; sizes, and numbers of LoRAs, at batch 1."""
    usual = f"{model}-{_NATIVE[model]}-b1"
    return Sweep(
        [usual.replace("-b1", f"-b{batch}") for batch in (1, 2, 4, 8, 16)],
        [f"{model}-{size}-b1" for size in (512, 768, 1024, 1536, 2048)],
        [usual, *(f"{usual}-lora{count}" for count in (1, 2, 4, 8))],
    )


def _switches(model: str) -> list[str]:
    kinds = ("switch-{}-1", "switch-{}-2", "switch-{}-5", "strength-{}-5", "cold-{}-5")
    return [f"lora-{kind.format(model)}" for kind in kinds]


_GROUPS = {
    "main": ["sd15-512-b1", "sdxl-1024-b1"],
    "grid-sd15": sweep("sd15").all(),
    "grid-sdxl": sweep("sdxl").all(),
    "switches-sd15": _switches("sd15"),
    "switches-sdxl": _switches("sdxl"),
    "switches": [*_switches("sd15"), *_switches("sdxl")],
    "vae": [f"vae-{size}-b{batch}" for size in (512, 1024) for batch in (1, 4)],
}
