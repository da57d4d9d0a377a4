"""Control images for tests and the demo: one drawn scene, as its edges and as its depth."""

from pathlib import Path

from PIL import Image, ImageDraw

_SIZE = 512
# From far to near: brightness in the depth image, corners. A lighthouse on a cliff.
_SCENE = (
    (60, [(-5, 330), (517, 330), (517, 517), (-5, 517)]),
    (120, [(-5, 290), (60, 270), (120, 310), (180, 345), (200, 400), (-5, 430)]),
    (180, [(150, 517), (220, 400), (300, 350), (430, 340), (517, 370), (517, 517)]),
    (225, [(318, 360), (342, 140), (398, 140), (422, 360)]),
    (235, [(326, 140), (326, 125), (414, 125), (414, 140)]),
    (245, [(345, 125), (345, 85), (395, 85), (395, 125)]),
    (255, [(335, 85), (370, 45), (405, 85)]),
)


def make_control_images(root: Path) -> dict[str, Path]:
    """Put `edges` and `depth` into the base directory `root`; return name to file."""
    placed: dict[str, Path] = {}
    for name in ("edges", "depth"):
        placed[name] = root / "input" / f"{name}.png"
        _draw(name).save(placed[name])
    return placed


def _draw(name: str) -> Image.Image:
    image = Image.new("RGB", (_SIZE, _SIZE))
    pen = ImageDraw.Draw(image)
    for brightness, corners in _SCENE:
        if name == "edges":  # filled as well, so that near things hide far ones
            pen.polygon(corners, fill="black", outline="white", width=3)
        else:
            pen.polygon(corners, fill=(brightness,) * 3)
    return image
