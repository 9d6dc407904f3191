"""A procedural world in which transfer is a number: clips made from six known factors, and pairs of clips that share exactly one.

    identity    shape, texture and colours of the sprite        camera   how the view pans, zooms and rolls
    background  scenery and pattern                             effect   what sweeps over the picture as time goes by
    motion      the sprite's path from where it starts          style    how the whole picture is drawn

A pair of task X shares X and nothing else. What moves is followed on the screen, so the sprites of a motion or camera pair start from the
same place; those of all other pairs do not. Temporal tasks (motion, camera, effect) give the target's first frame, and nothing but X
happens in the target, so reference and first frame determine it. Appearance tasks (id, style) give a caption of all that is not X.

Held-out values of a factor never occur in training: directions of motion and camera that no training clip has, and combinations of
the parts of identity, effect and style. A held-out pair shares a held-out value; all else in it is drawn as in training.

The same key gives the same bytes on every machine: choices are hashes, and pixels come from operations that IEEE 754 defines to the
last bit (no sine of a library, no sum over an axis, whose order differs from one processor to another).
"""

import hashlib
from collections.abc import Collection, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from configs.run import VideoConfig
from omnitransfer_jax import tasks

Split = Literal["train", "held_out"]

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
NOTHING = {
    "identity": "the same one",
    "motion": "rests here",
    "camera": "view stays",
    "effect": "nothing else happens",
    "style": "plain look",
}
UNSAID = {"identity": "the same one", "style": "same look"}  # what a caption says of the factor that the reference shows


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


class Example(NamedTuple):
    """One pair."""

    id: str
    task: str
    reference: Scene
    target: Scene
    prompt: str
    """What the model is told: nothing in temporal tasks, a caption in appearance tasks."""

    @property
    def is_temporal(self) -> bool:
        """Whether the target's first frame is given."""
        return tasks.TASKS[tasks.task_index(self.task)].family == "temporal"


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
SHARES = {"id": "identity", "style": "style", "motion": "motion", "camera": "camera", "effect": "effect"}  # task -> factor
SENTENCES = (*NOTHING.values(), *UNSAID.values())
WORDS = tuple(sorted({word for values in VALUES.values() for value in values for word in value} | set(" ".join(SENTENCES).split())))

TURNS = (*tasks.NAMES, "style", "motion", "camera")  # a network learns these three late, so they come twice

# How often a factor that a pair does not share is there, in a reference or in the target of an appearance task. Camera and effect are not.
PRESENT = {"motion": 1 / 4, "style": 1 / 4}
EDGE = 0.78  # the sprite's centre stays within this part of the picture


def is_held_out(factor: str, value: Any) -> bool:
    """Whether training never sees this value of a factor. Each of its parts occurs in training, but for held-out directions."""
    match factor:
        case "identity":
            return _places(COLOURS, value.colours, TEXTURES, value.texture, SHAPES, value.shape) % 6 == 0
        case "effect":
            return _places(LIGHTS, value.light, EFFECTS, value.kind, SIDES, value.side) % 6 == 0
        case "style":
            return _places(HUES, value.hue, DRAWINGS, value.drawing) % 6 == 0
        case "motion":
            return value.direction in ("nne", "wsw")
        case "camera":
            return value.hour in ("two", "nine")
        case _:
            return False


def _places(*parts: Any) -> int:
    """The sum of the places of names in their lists, given as list, name, list, name, ..."""
    return sum(list(names).index(name) for names, name in zip(parts[::2], parts[1::2], strict=True))


TRAINED = {factor: tuple(v for v in values if not is_held_out(factor, v)) for factor, values in VALUES.items()}
HELD_OUT = {factor: tuple(v for v in values if is_held_out(factor, v)) for factor, values in VALUES.items()}


class Draw:
    """Choices that depend on the words of a path alone, on every machine alike."""

    def __init__(self, *path: Any):
        self.path = path

    def number(self, *name: Any) -> int:
        """64 random bits."""
        text = "/".join(map(str, (*self.path, *name)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def choose(self, options: Sequence[Any], *name: Any) -> Any:
        """One of `options`."""
        return options[self.number(*name) % len(options)]

    def happens(self, probability: float, *name: Any) -> bool:
        """True as often as `probability` says."""
        return self.number(*name) < probability * 2**64


def example(key: int, index: int, split: Split, task: str | None = None) -> Example:
    """Pair `index` of the endless list that `key` stands for; the tasks take turns unless one is named."""
    task = TURNS[index % len(TURNS)] if task is None else task
    shared, temporal = SHARES[task], tasks.TASKS[tasks.task_index(task)].family == "temporal"
    draw = Draw("world", key, split, task, index)
    value = draw.choose((TRAINED if split == "train" else HELD_OUT)[shared], "shared")
    sides = {}
    for side, presence in (("reference", PRESENT), ("target", {} if temporal else PRESENT)):
        presence = presence | {"identity": 1, "background": 1}
        if task == "id":
            presence = presence | {"style": 0}  # it would hide the colours that are to be kept
        if side == "target" and temporal:
            presence = presence | {"style": PRESENT["style"]}  # it is seen in the first frame
        other = sides.get("reference")
        factors = {shared: value}
        for factor in (f for f in FACTORS if f != shared):
            if draw.happens(presence.get(factor, 0), side, factor, "present"):
                options = [v for v in TRAINED[factor] if other is None or v != getattr(other, factor)]
                factors[factor] = draw.choose(options, side, factor)
        starts = [s for s in VALUES["start"] if _stays_inside(s, factors.get("motion")) and (other is None or s != other.start)]
        if other is not None and task in ("motion", "camera"):
            starts = [other.start]
        sides[side] = Scene(start=draw.choose(starts, side, "start"), **factors)
    prompt = "" if temporal else caption(sides["target"], {shared})
    return Example(f"{task}-{split}-{key}-{index}", task, sides["reference"], sides["target"], prompt)


def alternatives(scene: Scene, factor: str, key: int, count: int = 7) -> list[Scene]:
    """`count` scenes that differ from `scene` in one factor, each by another value of it."""
    draw, found = Draw("alternatives", key, caption(scene)), []
    options = [v for v in VALUES[factor] if v != getattr(scene, factor)]
    for k in range(count):
        found.append(options.pop(draw.number(k) % len(options)))
    return [scene._replace(**{factor: value}) for value in found]


def caption(scene: Scene, without: Collection[str] = ()) -> str:
    """A sentence about every factor; of those in `without` it says only that they are the same.

    Every factor always takes as many words, and no word serves two factors.
    """

    def say(factor: str) -> str:
        value = getattr(scene, factor)
        return UNSAID[factor] if factor in without else NOTHING[factor] if value is None else " ".join(value)

    start, background = " ".join(scene.start), " ".join(scene.background)
    return f"{say('identity')} {say('motion')} {start}, {background}, {say('camera')}, {say('effect')}, {say('style')}"


def render(scene: Scene, video: VideoConfig) -> UInt8[np.ndarray, "T H W 3"]:
    """The clip of a scene."""
    time, u, v = _screen(video)
    x, y, zoom = _through_camera(scene.camera, time, u, v)
    pixel = np.float32(2 / video.height) * zoom
    picture = _with_sprite(_background(scene.background, x, y), scene, time, x, y, pixel)
    if scene.style is not None:
        picture = _stylise(picture, scene.style, u, v)
    if scene.effect is not None:
        picture = _with_effect(picture, scene.effect, time, u, v)
    return _to_bytes(picture)


def render_moved(scene: Scene, video: VideoConfig, moved: Float[np.ndarray, "N 2"]) -> UInt8[np.ndarray, "N H W 3"]:
    """The first frame of a scene, its sprite moved by so many pixels, columns and rows."""
    time, u, v = _screen(video)
    pixel = np.full_like(time[:1], 2 / video.height)
    dx, dy = (moved.astype(np.float32) * pixel[0]).T[:, :, None, None]
    picture = _with_sprite(_background(scene.background, u, v), scene, time[:1], u - dx, v - dy, pixel)
    return _to_bytes(picture if scene.style is None else _stylise(picture, scene.style, u, v))


def track(scene: Scene, video: VideoConfig) -> Float[np.ndarray, "T 2"]:
    """The sprite's centre in each frame, column and row in pixels."""
    time, _, _ = _screen(video)
    centre = _start(scene.start) + _path(scene.motion, time)[:, 0, 0]
    x, y = _from_world(scene.camera, time[:, 0, 0], centre[:, 0], centre[:, 1])
    half = video.height / 2
    return np.stack([x * half + video.width / 2, y * half + half], -1) - 0.5


def places(scene: Scene, video: VideoConfig) -> Float[np.ndarray, "T H W 2"]:
    """The point of the world that each pixel shows, in pixels of a camera that does not move."""
    x, y, _ = _through_camera(scene.camera, *_screen(video))
    half = video.height / 2
    return np.stack([x, y], -1) * half


def coverage(scene: Scene, video: VideoConfig) -> Float[np.ndarray, "T H W"]:
    """How much of each pixel the sprite covers, 0 to 1."""
    time, u, v = _screen(video)
    x, y, zoom = _through_camera(scene.camera, time, u, v)
    return _cover(scene.identity.shape, *_in_sprite(scene, time, x, y), np.float32(2 / video.height) * zoom / RADIUS)


RADIUS = np.float32(0.4)  # of the sprite; the picture is 2 high


def _screen(video: VideoConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Time 0 to 1 "T 1 1", and the pixels' coordinates "1 1 W" and "1 H 1": 0 in the middle, -1 to 1 from top to bottom."""
    time = np.arange(video.frames, dtype=np.float32) / np.float32(max(1, video.frames - 1))
    u = (2 * np.arange(video.width, dtype=np.float32) + 1 - video.width) / np.float32(video.height)
    v = (2 * np.arange(video.height, dtype=np.float32) + 1 - video.height) / np.float32(video.height)
    return time[:, None, None], u[None, None, :], v[None, :, None]


def _sine(turns: Any) -> Any:
    """Sine of an angle in turns, to about 0.001, by operations that are exact on every machine."""
    z = 2 * (turns - np.floor(turns + np.float32(0.5)))
    p = 4 * z * (1 - np.abs(z))
    return p + np.float32(0.225) * (p * np.abs(p) - p)


def _unit(turns: Any) -> tuple[Any, Any]:
    """Direction at an angle in turns, counted against the clock from the right; y points down."""
    turns = np.asarray(turns, np.float32)
    return _sine(turns + np.float32(0.25)), -_sine(turns)


def _turns(names: Sequence[str], name: str) -> np.float32:
    return np.float32(names.index(name) / len(names))


def _start(start: Start) -> np.ndarray:
    """The sprite's centre in the world, x and y."""
    return np.array([COLUMNS.index(start.column), ROWS.index(start.row)], np.float32) * np.float32(0.2) - np.float32(0.3)


def _path(motion: Motion | None, time: np.ndarray) -> np.ndarray:
    """How far the sprite is from its start: "T 1 1 2"."""
    if motion is None:
        return np.stack([0 * time, 0 * time], -1)
    turns, long = _turns(COMPASS, motion.direction), np.float32(0.9)
    (ax, ay), (sx, sy) = _unit(turns), _unit(turns + np.float32(0.25))
    match motion.path:
        case "glides":
            along, aside = long * time, 0 * time
        case "swings":
            along, aside = long * _sine(time / 2), 0 * time
        case "circles":
            along, aside = np.float32(0.42) * _sine(time), np.float32(0.42) * (1 - _sine(time + np.float32(0.25)))
        case _:  # turns
            half = np.float32(0.5)
            along, aside = long * np.minimum(time, half) * np.float32(1.5), long * np.maximum(time - half, 0) * np.float32(1.5)
    return np.stack([ax * along + sx * aside, ay * along + sy * aside], -1)


def _stays_inside(start: Start, motion: Motion | None) -> bool:
    time = np.arange(33, dtype=np.float32)[:, None, None] / np.float32(32)
    return bool((np.abs(_start(start) + _path(motion, time)) <= EDGE).all())


def _camera(camera: Camera | None, time: np.ndarray) -> tuple[Any, Any, Any, Any]:
    """Drift x and y, zoom (how much of the world a unit of the screen shows) and roll in turns at each time."""
    if camera is None:
        return 0 * time, 0 * time, 1 + 0 * time, 0 * time
    dx, dy = _unit(_turns(HOURS, camera.hour))
    drift = np.float32(0.75 if camera.view == "pans" else 0.45) * time
    zoom, roll = 1 + 0 * time, 0 * time
    match camera.view:
        case "pushes":
            zoom = 1 - np.float32(0.4) * time
        case "pulls":
            zoom = 1 + np.float32(0.7) * time
        case "rolls":
            roll = np.float32(0.125) * time
        case "tilts":
            roll = np.float32(-0.125) * time
    return dx * drift, dy * drift, zoom, roll


def _through_camera(camera: Camera | None, time: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The world's coordinates that the pixels show, "T H W" each, and the zoom "T 1 1"."""
    dx, dy, zoom, roll = _camera(camera, time)
    cos, sin = _sine(roll + np.float32(0.25)), _sine(roll)
    x, y = zoom * (cos * u - sin * v) + dx, zoom * (sin * u + cos * v) + dy
    return x, y, zoom


def _from_world(camera: Camera | None, time: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `_through_camera` for one point a time, up to the accuracy of `_sine`."""
    dx, dy, zoom, roll = _camera(camera, time)
    cos, sin = _sine(roll + np.float32(0.25)), _sine(roll)
    x, y = (x - dx) / zoom, (y - dy) / zoom
    return cos * x + sin * y, cos * y - sin * x


def _colour(code: str) -> np.ndarray:
    """ "#rrggbb" as three numbers from 0 to 1."""
    return np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)], np.float32) / np.float32(255)


def _mix(a: Any, b: Any, share: Any) -> Any:
    return a + (b - a) * share


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(picture, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _clip(x: Any) -> Any:
    return np.clip(x, 0, 1).astype(np.float32)


def _background(background: Background, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two colours in a soft pattern, under a light that varies slowly: "T H W 3"."""
    match background.pattern:
        case "stripes":
            wave = _sine((x + np.float32(0.5) * y) / np.float32(1.2))
        case "squares":
            wave = np.float32(1.6) * _sine(x / np.float32(1.5)) * _sine(y / np.float32(1.5))
        case "dots":
            wave = _sine(x / np.float32(1.2)) + _sine(y / np.float32(1.2)) - np.float32(0.7)
        case "ripples":
            wave = _sine(np.sqrt(x * x + y * y) / np.float32(1.1))
        case _:  # hills
            wave = _sine((y + np.float32(0.2) * _sine(x / np.float32(1.6))) / np.float32(1.2))
    light, dark = map(_colour, SCENERIES[background.scenery])
    sun = 1 + np.float32(0.12) * _sine((x - y) / np.float32(5)) + np.float32(0.06) * _sine((x + y) / np.float32(3.3))
    return _mix(light, dark, _clip(np.float32(0.5) + wave)[..., None]) * sun[..., None]


def _in_sprite(scene: Scene, time: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in which the sprite is the unit disc."""
    place = _start(scene.start) + _path(scene.motion, time)
    return (x - place[..., 0]) / RADIUS, (y - place[..., 1]) / RADIUS


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far outside the shape a point is; negative inside."""
    ax, ay = np.abs(x), np.abs(y)
    match shape:
        case "disc":
            return np.sqrt(x * x + y * y) - np.float32(0.95)
        case "square":
            return np.maximum(ax, ay) - np.float32(0.82)
        case "triangle":
            return np.maximum(np.float32(0.894) * ax - np.float32(0.447) * y, y) - np.float32(0.62)
        case "diamond":
            return (ax + ay - np.float32(1.15)) * np.float32(0.7071)
        case "ring":
            return np.abs(np.sqrt(x * x + y * y) - np.float32(0.68)) - np.float32(0.3)
        case _:  # cross
            narrow, wide = np.float32(0.36), np.float32(0.98)
            return np.minimum(np.maximum(ax - narrow, ay - wide), np.maximum(ax - wide, ay - narrow))


def _cover(shape: str, x: np.ndarray, y: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    return _clip(np.float32(0.5) - _distance(shape, x, y) / pixel)


def _with_sprite(picture: np.ndarray, scene: Scene, time: np.ndarray, x: np.ndarray, y: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """The picture with a soft shadow, and the sprite on it."""
    (x, y), pixel = _in_sprite(scene, time, x, y), pixel / RADIUS
    shape, one = scene.identity.shape, np.float32(1)
    shadow = _clip(np.float32(0.5) - _distance(shape, x - np.float32(0.15), y - np.float32(0.25)) / np.float32(0.5))
    picture = picture * (1 - np.float32(0.35) * shadow)[..., None]
    match scene.identity.texture:
        case "rimmed":
            share = _clip(np.float32(0.5) + (_distance(shape, x, y) + np.float32(0.3)) / pixel)
        case "barred":
            share = _clip(np.float32(0.5) + np.float32(1.5) * _sine(x / np.float32(1.1)))
        case "spotted":
            share = _clip(np.float32(0.5) + np.float32(2) * _sine(x / np.float32(1.6)) * _sine(y / np.float32(1.6)))
        case _:  # split
            share = _clip(np.float32(0.5) + (x + y) / pixel * np.float32(0.7))
    first, second = map(_colour, COLOURS[scene.identity.colours])
    return _mix(picture, _mix(first, second, share[..., None]), (one * _cover(shape, x, y, pixel))[..., None])


def _stylise(picture: np.ndarray, style: Style, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The picture drawn in another way, frame by frame: its brightness in shades of a hue, and something on top of it."""
    hue = _colour(HUES[style.hue])
    dark, light = hue * np.float32(0.22), _mix(hue, np.float32(1), np.float32(0.6))
    grey = picture[..., 0] * np.float32(0.3) + picture[..., 1] * np.float32(0.59) + picture[..., 2] * np.float32(0.11)
    tinted = _mix(dark, light, grey[..., None])
    match style.drawing:
        case "duotone":
            return tinted
        case "framed":  # a bright border
            return _mix(tinted, light, _clip((np.maximum(np.abs(u), np.abs(v)) - np.float32(0.72)) / np.float32(0.12))[..., None])
        case "hatched":  # dark strokes from one corner to the other
            return _mix(tinted, dark, _clip(np.float32(0.3) + np.float32(0.6) * _sine((u + v) / np.float32(0.8)))[..., None])
        case _:  # vignetted, dark corners
            return _mix(tinted, dark, _clip((u * u + v * v - np.float32(0.4)) / np.float32(0.8))[..., None])


def _with_effect(picture: np.ndarray, effect: Effect, time: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The picture under an effect that begins with nothing at time 0."""
    dx, dy = _unit(_turns(SIDES, effect.side))
    along = u * dx + v * dy  # 1.4 at most
    x, y = u - dx * np.float32(0.55), v - dy * np.float32(0.55)
    distance, soft = np.sqrt(x * x + y * y), np.float32(0.3)
    match effect.kind:
        case "sweep":  # a curtain drawn from that side
            share = (along - np.float32(1.6) + np.float32(2.6) * time) / soft
        case "iris":  # a growing circle
            share = (np.float32(2.1) * time - np.float32(0.15) - distance) / soft
        case "ripple":  # a growing ring
            share = 1 - np.abs(distance - np.float32(2) * time) / np.float32(0.4) + np.minimum(0, 8 * time - 1) * 2
        case _:  # glow, light that comes from that side
            share = time * (np.float32(0.55) + np.float32(0.5) * along) * np.float32(1.2)
    return _mix(picture, _colour(LIGHTS[effect.light]), (_clip(share) * np.float32(0.85))[..., None])
