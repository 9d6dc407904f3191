"""The clip of a scene, and where its sprite and its camera are.

The same scene gives the same bytes on every machine: pixels come from operations that IEEE 754 defines to the last bit (no sine of a
library, no sum over an axis, whose order differs from one processor to another).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from configs.run import VideoConfig
from world.scenes import (
    COLOURS,
    COLUMNS,
    COMPASS,
    HOURS,
    HUES,
    LIGHTS,
    ROWS,
    SCENERIES,
    SIDES,
    Background,
    Camera,
    Effect,
    Motion,
    Scene,
    Start,
    Style,
)

RADIUS = np.float32(0.4)  # of the sprite; the picture is 2 high
EDGE = 0.78  # the sprite's centre stays within this part of the picture


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
    """The first frame of a scene N times, its sprite moved by `moved` pixels: columns, rows."""
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
    """The point of the world at each pixel, column and row, in pixels of a camera that does not move."""
    x, y, _ = _through_camera(scene.camera, *_screen(video))
    half = video.height / 2
    return np.stack([x, y], -1) * half


def coverage(scene: Scene, video: VideoConfig) -> Float[np.ndarray, "T H W"]:
    """How much of each pixel the sprite covers, 0 to 1."""
    time, u, v = _screen(video)
    x, y, zoom = _through_camera(scene.camera, time, u, v)
    return _cover(scene.identity.shape, *_in_sprite(scene, time, x, y), np.float32(2 / video.height) * zoom / RADIUS)


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


def stays_inside(start: Start, motion: Motion | None) -> bool:
    """Whether the sprite's centre never comes nearer to the picture's edge than `EDGE` allows, while the camera rests."""
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
    """The world's coordinates at the pixels, "T H W" each, and the zoom "T 1 1"."""
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
    """The picture under an effect; at time 0 the picture is unchanged."""
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
