"""What is measured: one frozen row a scenario, and the real models' shapes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """A sampling run. `size` is the image's edge in pixels; the latent's is an eighth."""

    name: str
    model: str
    size: int
    batch: int
    steps: int = 20
    cfg: float = 7.0
    tokens: int = 77


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("sd15-512-b1", "sd15-full", 512, 1),
        Scenario("sd15-512-b8", "sd15-full", 512, 8),
        Scenario("sdxl-1024-b1", "sdxl-full", 1024, 1),
        Scenario("sdxl-1024-b4", "sdxl-full", 1024, 4),
    )
}
# Tiny models on the CPU: every line of the benchmark runs, no figure means anything.
DRY = {
    scenario.name: scenario
    for scenario in (
        Scenario("sd15-512-b1", "sd15-dry", 128, 1, steps=3),
        Scenario("sdxl-1024-b1", "sdxl-dry", 128, 1, steps=3),
    )
}
