"""Example clips and their manifest: one pair of each task, simple shapes that move.

python -m data_pipelines.example --out=clips
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs.errors import RequestError
from data_pipelines import clips
from omnitransfer_jax.folders import outputs
from omnitransfer_jax.folders.atomic import write_whole

FRAMES, HEIGHT, WIDTH, FPS = 32, 64, 96, 16
MANIFEST_FILE = "manifest.jsonl"
RED, GREEN, BLUE, YELLOW, NIGHT, SNOW = (220, 50, 40), (60, 180, 90), (50, 90, 220), (240, 210, 60), (20, 20, 50), (235, 240, 245)
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)

Picture = np.ndarray
Color = tuple[int, int, int]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="folder for the clips and manifest.jsonl")
    out = parser.parse_args().out
    try:
        outputs.require_folder("--out", out)
    except RequestError as error:
        parser.error(str(error))
    manifest = write_example(Path(out))
    print(f"wrote {manifest}")
    print(f"Next: python -m launch.encode --config=stage1:smoke --manifest={manifest} --out=records")


def write_example(folder: Path) -> Path:
    """Writes two clips a task, a first frame for the effect, and the manifest, whose path is returned."""
    rows = []
    for task, (reference, target, prompt) in SCENES.items():
        row: dict[str, Any] = {"id": f"{task}_1", "task": task, "prompt": prompt}
        for role, scene in (("reference", reference), ("target", target)):
            row[role] = f"{task}_{role}.mp4"
            clips.write_clip(folder / row[role], np.stack([scene(i / (FRAMES - 1)) for i in range(FRAMES)]), FPS)
        if task == "effect":
            row["first_frame"] = "effect_first_frame.png"
            Image.fromarray(target(0.0)).save(folder / row["first_frame"])
        rows.append(row)
    manifest = folder / MANIFEST_FILE
    write_whole(manifest, "".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def disc(ground: Color, color: Color, row: float, column: float, size: float = 12) -> Picture:
    """A disc of `color`, its centre at (row, column) as shares of the picture, on `ground`."""
    return _paint(ground, color, np.hypot(ROWS - row * HEIGHT, COLUMNS - column * WIDTH) < size)


def square(ground: Color, color: Color, row: float, column: float, size: float = 12) -> Picture:
    """The same with a square."""
    return _paint(ground, color, np.maximum(abs(ROWS - row * HEIGHT), abs(COLUMNS - column * WIDTH)) < size)


def pattern(ground: Color, color: Color, shift: float, tile: int) -> Picture:
    """A checked wall, moved to the left by `shift` widths of the picture."""
    return _paint(ground, color, (ROWS // tile + (COLUMNS + shift * WIDTH) // tile) % 2 == 0)


def faded(picture: Picture, share: float) -> Picture:
    """A picture that turns to white."""
    return np.rint(picture + (255.0 - picture) * share).astype(np.uint8)


def bounce(time: float) -> float:
    """Height of a ball that falls and comes back twice, from 0.2 to 0.8."""
    return 0.2 + 0.6 * abs(float(np.sin(2 * np.pi * time)))


def _paint(ground: Color, color: Color, inside: np.ndarray) -> Picture:
    return np.where(inside[..., None], np.array(color, np.uint8), np.array(ground, np.uint8))


Scene = Callable[[float], Picture]
SCENES: dict[str, tuple[Scene, Scene, str]] = {  # reference, target and prompt; a scene is a picture at a time from 0 to 1
    "id": (
        lambda t: disc(NIGHT, RED, 0.5, 0.2 + 0.6 * t),
        lambda t: disc(SNOW, RED, 0.8 - 0.6 * t, 0.5),
        "a red ball rises in the snow",
    ),
    "style": (
        lambda t: square(YELLOW, BLUE, 0.5, 0.2 + 0.6 * t),
        lambda t: disc(YELLOW, BLUE, 0.2 + 0.6 * t, 0.5),
        "a ball sinks",
    ),
    "motion": (lambda t: disc(NIGHT, GREEN, bounce(t), 0.5), lambda t: square(SNOW, BLUE, bounce(t), 0.5), ""),
    "camera": (lambda t: pattern(NIGHT, SNOW, t, 16), lambda t: pattern(GREEN, YELLOW, t, 24), ""),
    "effect": (lambda t: faded(disc(NIGHT, RED, 0.5, 0.5), t), lambda t: faded(square(BLUE, GREEN, 0.5, 0.5), t), ""),
}

if __name__ == "__main__":
    main()
