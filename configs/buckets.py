"""Declared sizes of a training: `--data.buckets 81x480x832 81x832x480 49x480x832/33x240x416`, frames x height x width.

Behind the slash stands the size of the references; without one it is `data.reference`. A batch has one size, and the step is compiled once
for each. Rates are those of `video` and `data.reference`.
"""

import re
from dataclasses import replace
from typing import Any

from configs.errors import require

SIZE = r"(\d{1,6})x(\d{1,6})x(\d{1,6})"


def bucket_configs(config: Any) -> dict[str, Any]:
    """By name, which is also that of its folder of records, the configuration of each bucket; of one without buckets itself, named ""."""
    found = {}
    for text in config.data.buckets:
        match = re.fullmatch(rf"{SIZE}(?:/{SIZE})?", text)
        require(match is not None, f"data.buckets={text!r}: FRAMESxHEIGHTxWIDTH of targets, or that and /FRAMESxHEIGHTxWIDTH of references")
        assert match is not None
        numbers = [None if number is None else int(number) for number in match.groups()]
        video, reference = sized(config.video, numbers[:3]), sized(config.data.reference, numbers[3:])
        name = f"{written(video)}_{written(reference)}"
        require(name not in found, f"data.buckets={text!r}: there twice; name every size once")
        found[name] = replace(config, video=video, data=replace(config.data, reference=reference, buckets=()))
    return found or {"": config}


def sized(video: Any, numbers: list[int | None]) -> Any:
    """`video` with other frames, height and width, or as it is."""
    return video if None in numbers else replace(video, frames=numbers[0], height=numbers[1], width=numbers[2])


def written(video: Any) -> str:
    return f"{video.frames}x{video.height}x{video.width}"


def require_buckets(config: Any) -> None:
    """A `RequestError` for a bucket whose sizes cannot be."""
    for name, each in bucket_configs(config).items():
        for video, of in ((each.video, "target"), (each.data.reference, "reference")):
            if name:
                video.validate(f"data.buckets: {of} of {name.replace('_', '/')}", config.vae, config.dit.patch)
