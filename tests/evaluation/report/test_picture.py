"""The moving picture of a few transfers."""

import numpy as np
from PIL import Image

from evaluation.report import picture


def test_every_clip_is_where_its_column_and_row_say(tmp_path):
    """Clips of one colour a frame, found again in the file."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 2, 5, 3), np.uint8)  # columns, rows, frames
    clips = np.broadcast_to(colours[:, :, :, None, None], (3, 2, 5, 8, 8, 3))
    columns = [picture.Column(f"column {j}", tuple(clips[j])) for j in range(3)]
    picture.write(columns, ("above", "below"), tmp_path / "out.webp", fps=8.0)
    with Image.open(tmp_path / "out.webp") as image:
        assert image.n_frames == 5
        assert image.info["loop"] == 0
        step, right = picture.SIDE + picture.GAP, image.width - picture.GAP - picture.SIDE // 2
        for t in range(5):
            image.seek(t)
            pixels = np.asarray(image.convert("RGB")).astype(int)
            for j in range(3):
                for i in range(2):
                    found = pixels[picture.TEXT + i * step + picture.SIDE // 2, right - (2 - j) * step]
                    assert np.abs(found - colours[j, i, t]).max() <= 12  # the file is compressed with loss
