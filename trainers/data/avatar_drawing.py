"""Avatars drawn in layers by python_avatars and resvg, and where each part is seen; nothing is fetched."""

import io
from functools import cache
from importlib.util import find_spec
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from .avatar_classes import PARTS, worn_by


# The figure is 264 x 280 units; it is drawn this wide and centred on a square.
WIDTH, CANVAS = 192, 204
# One colour for all beards, one for all hats: the colours of hair and clothes then show in hair and clothes alone.
BEARD_COLOUR, HAT_COLOUR = "#5A4A42", "#3C4F5C"
SKIN_COLOURS = ("#FD9841", "#F8D25C", "#FFDBB4", "#EDB98A", "#D08B5B", "#AE5D29", "#614335")
EYES = ("CLOSED", "DEFAULT", "EYE_ROLL", "HAPPY", "HEART", "SIDE", "SQUINT", "SURPRISED", "WINK", "X_DIZZY")
EYEBROWS = ("ANGRY", "DEFAULT", "FLAT_NATURAL", "FROWN_NATURAL", "RAISED_EXCITED", "SAD_CONCERNED", "UP_DOWN")
_EMPTY = {"top": "NONE", "eyes": "", "eyebrows": "", "nose": "", "mouth": "", "clothing": ""}
_KINDS = {
    "top": "HairType",
    "hat": "HatType",
    "eyes": "EyeType",
    "eyebrows": "EyebrowType",
    "nose": "NoseType",
    "mouth": "MouthType",
    "facial_hair": "FacialHairType",
    "accessory": "AccessoryType",
    "clothing": "ClothingType",
}


def require_drawing() -> None:
    """Raise ImportError unless the extra `vision` is installed."""
    missing = [name for name in ("python_avatars", "resvg_py", "scipy") if find_spec(name) is None]
    if missing:
        raise ImportError(f"AvatarParts needs {', '.join(missing)}: `pip install 'hf-sigma[vision]'`.")


def draw(label: int, skin: str, eyes: str, eyebrows: str) -> Image.Image:
    """The person of a class as a `CANVAS` x `CANVAS` RGBA cut-out, layer over layer."""
    below, above = _fixed_layers(label)
    figure = layer("body", "DEFAULT", skin).copy()
    for part in (below, layer("eyes", eyes), layer("eyebrows", eyebrows), above):
        figure.alpha_composite(part)
    return figure


@cache
def map_of_parts(label: int) -> np.ndarray:
    """
    Where the parts of a class are seen: `(CANVAS, CANVAS)` uint8, i + 1 for `PARTS[i]`, 0 elsewhere.

    A pixel is a part's if a change of the part's colour changes the pixel by more than half as much, so shadows and
    what is hidden do not count. The lenses of glasses count as eyewear, although one looks through them.
    """
    layers = part_layers(label)
    parts = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    unseen_through = np.ones((CANVAS, CANVAS))
    for part in reversed(PARTS):
        if part not in layers:
            continue
        opacity = np.asarray(layers[part])[..., 3] / 255
        covers = _filled(opacity >= 0.5) if part == "eyewear" else opacity
        parts[(covers * unseen_through >= 0.5) & (parts == 0)] = PARTS.index(part) + 1
        unseen_through *= 1 - opacity
    return parts


def part_layers(label: int) -> dict[str, Image.Image]:
    """The layers of what the person of a class wears, in the order of `PARTS`."""
    worn = worn_by(label)
    drawn = {
        "clothes": (worn["clothing kind"], worn["clothing colour"]),
        "mouth": (worn["mouth"], ""),
        "hair": (worn["hair kind"], worn["hair colour"]),
    }
    drawn |= {part: (worn[part], "") for part in ("beard", "eyewear", "hat") if part in worn}
    return {part: layer(part, *drawn[part]) for part in PARTS if part in drawn}


@cache
def layer(part: str, name: str, colour: str = "") -> Image.Image:
    """One part alone, on nothing; "body" is the skin with the nose."""
    chosen = {
        "body": {"nose": name, "skin_color": colour},
        "clothes": {"clothing": name, "clothing_color": colour, "shirt_graphic": "DIAMOND"},
        "hair": {"top": name, "hair_color": colour},
        "beard": {"facial_hair": name, "facial_hair_color": BEARD_COLOUR},
        "eyewear": {"accessory": name},
        "hat": {"hat": name, "hat_color": HAT_COLOUR},
    }.get(part, {part: name})
    return _rasterised(avatar_svg(chosen, with_body=part == "body"))


def avatar_svg(chosen: dict[str, str], *, with_body: bool = True) -> str:
    """The SVG of an avatar that has what is `chosen`, by python_avatars' names, and nothing else."""
    import python_avatars

    options = _EMPTY | chosen
    if "shirt_graphic" in options:
        options["shirt_graphic"] = python_avatars.ClothingGraphic[options["shirt_graphic"]]
    for option, kind in _KINDS.items():
        if options.get(option):
            options[option] = getattr(python_avatars, kind)[options[option]]
    if "hat" in options:
        options["top"] = options.pop("hat")
    svg = python_avatars.Avatar(style=python_avatars.AvatarStyle.TRANSPARENT, **options).render()
    if with_body:
        return svg
    tree = ElementTree.fromstring(svg)
    for parent in tree.iter():
        for child in [child for child in parent if child.get("id", "").endswith("_Body")]:
            parent.remove(child)
    return ElementTree.tostring(tree, encoding="unicode")


def _rasterised(svg: str) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=WIDTH, skip_system_fonts=True)
    figure = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (CANVAS, CANVAS))
    canvas.paste(figure, ((CANVAS - figure.width) // 2, CANVAS - figure.height))
    return canvas


@cache
def _fixed_layers(label: int) -> tuple[Image.Image, Image.Image]:
    """What lies below and above the eyes of a class; both stay the same in all its pictures."""
    below, above = (Image.new("RGBA", (CANVAS, CANVAS)) for _ in range(2))
    for part, drawn in part_layers(label).items():
        (below if part in ("clothes", "mouth") else above).alpha_composite(drawn)
    return below, above


def _filled(mask: np.ndarray) -> np.ndarray:
    from scipy.ndimage import binary_fill_holes

    return binary_fill_holes(mask)


__all__ = [
    "CANVAS",
    "EYEBROWS",
    "EYES",
    "SKIN_COLOURS",
    "avatar_svg",
    "draw",
    "layer",
    "map_of_parts",
    "part_layers",
    "require_drawing",
]
