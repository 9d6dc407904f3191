"""Scenes of the procedural world: six factors, their values, the values held out from training, and a caption in words.

    identity    shape, texture and colours of the sprite        camera   how the view pans, zooms and rolls
    background  scenery and pattern                             effect   what sweeps over the picture as time goes by
    motion      the sprite's path from where it starts          style    how the whole picture is drawn

world/pairs.py draws pairs of scenes that share exactly one factor, and world/pixels.py draws the clip of a scene.

Held-out values never occur in training: directions of motion and camera that no training clip has, and combinations of the parts of
identity, effect and style.
"""

from collections.abc import Collection
from itertools import product
from typing import Any, NamedTuple

SHAPES = ("disc", "square", "triangle", "diamond", "ring", "cross")
TEXTURES = ("rimmed", "barred", "spotted", "split")
COLOURS = {
    "ember": ("#e4572e", "#ffc914"), "lagoon": ("#17bebb", "#0b4f6c"), "candy": ("#ff6fb5", "#ffffff"), "lemon": ("#ffe14d", "#3a3a3a"),
    "royal": ("#5b2a86", "#c8b6ff"), "mint": ("#3ddc97", "#0f5132"), "coral": ("#ff7f6a", "#7a1f3d"), "ink": ("#16161d", "#9aa0a6"),
    "cobalt": ("#1e50ff", "#a7d8ff"), "ivory": ("#fff5dc", "#b07d4f"),
}  # fmt: skip
PATTERNS = ("stripes", "squares", "dots", "ripples", "hills")
SCENERIES = {
    "meadow": ("#b5d178", "#7fa650"), "dunes": ("#efd5a0", "#d3a562"), "harbour": ("#8fb8d6", "#4f7ea6"), "dusk": ("#9d8ab8", "#5d4f7f"),
    "snow": ("#f3f6f9", "#c3d0dc"), "clay": ("#d69a7a", "#a8664a"), "night": ("#39436a", "#1b2138"), "moss": ("#6f8d69", "#3f5a41"),
}  # fmt: skip
ROWS, COLUMNS = ("top", "upper", "lower", "bottom"), ("left", "midleft", "midright", "right")
PATHS = ("glides", "swings", "circles", "turns")
COMPASS = ("e", "ene", "ne", "nne", "n", "nnw", "nw", "wnw", "w", "wsw", "sw", "ssw", "s", "sse", "se", "ese")
VIEWS = ("pans", "pushes", "pulls", "rolls", "tilts")
HOURS = ("three", "two", "one", "twelve", "eleven", "ten", "nine", "eight", "seven", "six", "five", "four")
EFFECTS = ("sweep", "iris", "ripple", "glow")
SIDES = ("righthand", "upperright", "above", "upperleft", "lefthand", "lowerleft", "below", "lowerright")
LIGHTS = {"crimson": "#e0313f", "gold": "#ffb81c", "azure": "#2aa7ff", "white": "#fdfdfd", "violet": "#8a3ffc", "jade": "#12b886"}
DRAWINGS = ("duotone", "framed", "hatched", "vignetted")
HUES = {
    "rosy": "#e85d9a", "amber": "#f2a33a", "olive": "#8fa63a", "teal": "#2aa39a",
    "navy": "#3b5fc0", "plum": "#8e4bb8", "grey": "#8c8c8c", "rust": "#c4562e",
}  # fmt: skip
ABSENT = {  # what a caption says of a factor that the scene does not have
    "identity": "the same one",
    "motion": "rests here",
    "camera": "view stays",
    "effect": "nothing else happens",
    "style": "plain look",
}
SAME = {"identity": "the same one", "style": "same look"}  # what a caption says of the factor that the reference has


class Identity(NamedTuple):
    """The sprite."""

    colours: str
    texture: str
    shape: str


class Background(NamedTuple):
    """What is behind it."""

    scenery: str
    pattern: str


class Start(NamedTuple):
    """Where the sprite is in the first frame."""

    row: str
    column: str


class Motion(NamedTuple):
    """Its path from there."""

    path: str
    direction: str


class Camera(NamedTuple):
    """How the view moves."""

    view: str
    hour: str
    """Where it drifts to, as on the face of a clock."""


class Effect(NamedTuple):
    """What happens over the picture."""

    light: str
    kind: str
    side: str


class Style(NamedTuple):
    """How the picture is drawn; an effect lies on top of it."""

    hue: str
    drawing: str


class Scene(NamedTuple):
    """All factors of a clip, and the place its sprite starts from. None: at rest, unmoved, no effect, not stylised."""

    identity: Identity
    background: Background
    start: Start
    motion: Motion | None = None
    camera: Camera | None = None
    effect: Effect | None = None
    style: Style | None = None


VALUES: dict[str, tuple[Any, ...]] = {
    "identity": tuple(Identity(*parts) for parts in product(COLOURS, TEXTURES, SHAPES)),
    "background": tuple(Background(*parts) for parts in product(SCENERIES, PATTERNS)),
    "start": tuple(Start(*parts) for parts in product(ROWS, COLUMNS)),
    "motion": tuple(Motion(*parts) for parts in product(PATHS, COMPASS)),
    "camera": tuple(Camera(*parts) for parts in product(VIEWS, HOURS)),
    "effect": tuple(Effect(*parts) for parts in product(LIGHTS, EFFECTS, SIDES)),
    "style": tuple(Style(*parts) for parts in product(HUES, DRAWINGS)),
}
FACTORS = ("identity", "background", "motion", "camera", "effect", "style")
SENTENCES = (*ABSENT.values(), *SAME.values())
WORDS = tuple(sorted({word for values in VALUES.values() for value in values for word in value} | set(" ".join(SENTENCES).split())))


def is_held_out(factor: str, value: Any) -> bool:
    """Whether this value of a factor never occurs in training. Its parts do, in other combinations; held-out directions do not."""
    match factor:
        case "identity":
            return _positions(COLOURS, value.colours, TEXTURES, value.texture, SHAPES, value.shape) % 6 == 0
        case "effect":
            return _positions(LIGHTS, value.light, EFFECTS, value.kind, SIDES, value.side) % 6 == 0
        case "style":
            return _positions(HUES, value.hue, DRAWINGS, value.drawing) % 6 == 0
        case "motion":
            return value.direction in ("nne", "wsw")
        case "camera":
            return value.hour in ("two", "nine")
        case _:
            return False


def _positions(*parts: Any) -> int:
    """The sum of the positions of names in their lists; the arguments are list, name, list, name, ..."""
    return sum(list(names).index(name) for names, name in zip(parts[::2], parts[1::2], strict=True))


TRAINED = {factor: tuple(v for v in values if not is_held_out(factor, v)) for factor, values in VALUES.items()}
HELD_OUT = {factor: tuple(v for v in values if is_held_out(factor, v)) for factor, values in VALUES.items()}


def caption(scene: Scene, without: Collection[str] = ()) -> str:
    """A sentence about every factor; of the factors in `without` it says only that they are the same as the reference's.

    A factor always takes the same number of words, and no word serves two factors.
    """

    said = {factor: SAME[factor] if factor in without else phrase(scene, factor) for factor in FACTORS}
    start = " ".join(scene.start)
    return "{identity} {motion} {start}, {background}, {camera}, {effect}, {style}".format(start=start, **said)


def phrase(scene: Scene, factor: str) -> str:
    """What a caption says of a factor."""
    value = getattr(scene, factor)
    return ABSENT[factor] if value is None else " ".join(value)
