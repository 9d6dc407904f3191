"""Clips that are bad in every way, and an encoder that is killed: bad ones are refused by name, good neighbours are all kept, once each."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np

from configs.errors import RequestError
from data_pipelines import clips, decoding, example, records
from tortures.outcome import Outcome
from tortures.processes import Job, command

SIZE = {"frames": 9, "fps": 8, "height": 32, "width": 48, "start": 0.0, "end": None}
LONGEST = 30.0  # seconds
encode = partial(command, "launch.encode")


def write_sources(folder: Path) -> list[Path]:
    """Undamaged clips in several containers and codecs."""
    manifest = example.write_example(folder)
    found = sorted(manifest.parent.glob("*_target.mp4"))
    video = clips.read_clip(found[0], frames=32, fps=16, height=64, width=96)
    for name, codec, options in (
        ("a.mkv", "libx264", {"g": "8", "bf": "2"}),
        ("b.webm", "libvpx-vp9", {}),
        ("c.avi", "mpeg4", {}),
        ("d.mov", "mjpeg", {}),
        ("e.mkv", "ffv1", {}),
    ):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=16, options=options)
            stream.width, stream.height = 96, 64
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for picture in video:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        found.append(folder / name)
    return found


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 4, 50])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def blank(content: bytes, draw: random.Random) -> bytes:
    at, size = draw.randrange(len(content)), draw.choice([16, 512, 4096])
    return content[:at] + bytes(len(content[at : at + size])) + content[at + size :]


def drop(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + content[at + draw.randrange(1, 2000) :]


def repeat(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + content[at : at + draw.randrange(1, 2000)] * 2 + content[at:]


def enlarge(content: bytes, draw: random.Random) -> bytes:
    """Numbers of the header, such as sizes, counts and durations, set to the largest."""
    changed = bytearray(content)
    at = draw.randrange(min(4000, len(changed) - 8))
    changed[at : at + draw.choice([2, 4, 8])] = b"\xff" * 8
    return bytes(changed[: len(content)])


def other(content: bytes, draw: random.Random) -> bytes:
    """What is no clip at all: text, playlists that name other files and addresses, archives, pickles."""
    texts = [
        b"", b"\0", b"<html><body>not found</body></html>", b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        b"#EXTM3U\n#EXTINF:5,\nfile:///etc/passwd\n", b'<?xml version="1.0"?><MPD><BaseURL>http://127.0.0.1:9/</BaseURL></MPD>',
        b"PK\x03\x04" + draw.randbytes(300), b"\x80\x04\x95" + draw.randbytes(100), draw.randbytes(5000),
        b"RIFF\xff\xff\xff\xffAVI LIST" + draw.randbytes(200), b"\x1aE\xdf\xa3" + b"\xff" * 400,
        b"\0\0\0\x18ftypmp42" + draw.randbytes(500),
        b"v=0\r\nm=video 9 RTP/AVP 96\r\nc=IN IP4 127.0.0.1\r\n", b"subfile,,start,0,end,0,,:/etc/passwd",
    ]  # fmt: skip
    return draw.choice(texts)


CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flip, blank, drop, repeat, enlarge, other)
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m3u8", ".txt", ".mp4.zip", "")


def bad_clips(folder: Path, count: int) -> Outcome:
    """Each is read as the encoder reads it: in a child with limits, and with the digest that the manifest may state of it."""
    sources, failures, silent, longest = write_sources(folder / "good"), [], 0, 0.0
    whole = {path: clips.read_clip(path, **SIZE) for path in sources}
    with decoding.decoder() as decoder:
        for case in range(count):
            draw = random.Random(case)
            source = draw.choice(sources)
            change = CHANGES[case % len(CHANGES)]
            content = change(source.read_bytes(), draw)
            path = folder / f"bad{case}{draw.choice([source.suffix] * 4 + [draw.choice(SUFFIXES)])}"
            path.write_bytes(content)
            started = time.monotonic()
            try:
                found = decoder.clip(path, **SIZE)
                if found.shape != whole[source].shape:
                    failures.append(f"case {case}, {change.__name__} of {source.name}: {found.shape} instead of {whole[source].shape}")
                silent += content != source.read_bytes() and not np.array_equal(found, whole[source])
            except RequestError as error:
                if not str(error).startswith(str(path)) or "\n" in str(error):
                    failures.append(f"case {case}, {change.__name__}: no line that begins with its path: {error}")
            seconds = time.monotonic() - started
            longest = max(longest, seconds)
            if seconds > LONGEST:
                failures.append(f"case {case}, {change.__name__} of {source.name}: {seconds:.0f} s")
            path.unlink()
        for path in sources:
            if not np.array_equal(decoder.clip(path, **SIZE), whole[path]):
                failures.append(f"{path.name}: a good clip is read otherwise after the bad ones")
    return Outcome(
        count, failures, f"the longest took {longest:.1f} s; {silent} decode to other pixels, which the digest of a manifest tells"
    )


def encoder_kills(folder: Path, count: int) -> Outcome:
    """An encoder of good and bad clips that is killed at random moments, and one of two processes that share the work: every good clip is
    there once, with the bytes of an encoder that was not killed."""
    manifest, bad = write_manifest(folder / "clips")
    failures = []

    def arguments(out: Path) -> list[str]:
        return ["--config=stage1:smoke", f"--manifest={manifest}", f"--out={out}", "--records_per_shard=2"]

    with Job(encode, arguments(folder / "whole"), log=folder / "whole.log") as job:
        started = time.monotonic()
        code, seconds = job.wait(600), 0.0
        seconds = time.monotonic() - started
    expected = read(folder / "whole")
    if code or len(expected) != 15:
        failures.append(f"without kills: code {code}, {len(expected)} records: {(folder / 'whole.log').read_text()[-300:]}")
    draw, killed, out = random.Random(0), 0, folder / "out"
    while killed < count:
        with Job(encode, arguments(out), log=folder / "run.log") as job:
            job.process.join(draw.uniform(0.2, 1.2) * seconds)
            if job.process.is_alive():
                job.send(signal.SIGKILL)
                killed += 1
                continue
            if code := job.wait():
                failures.append(f"after {killed} kills: code {code}: {job.output[-300:]}")
        failures += compared(read(out), expected, out, bad, f"after {killed} kills")
        shutil.rmtree(out)
    for index in range(2):
        with Job(encode, [*arguments(out), f"--shard_index={index}", "--shard_count=2"], log=folder / "run.log") as job:
            job.wait(600)
    with Job(encode, arguments(out), log=folder / "run.log") as job:
        job.wait(600)
    failures += compared(read(out), expected, out, bad, "at the end, by two processes")
    return Outcome(count, failures, f"{len(expected)} good clips and {len(bad)} bad ones")


def write_manifest(folder: Path) -> tuple[Path, set[str]]:
    """Fifteen good pairs and five bad ones between them; the ids of the bad ones."""
    rows = [json.loads(line) for line in example.write_example(folder).read_text().splitlines()]
    lines, bad = [], set()
    for number in range(3):
        for row in rows:
            lines.append(row | {"id": f"{row['id']}_{number}", "start": number * 0.1})
    for number, row in enumerate(rows):
        (folder / f"bad{number}.mp4").write_bytes(CHANGES[number](Path(folder / row["target"]).read_bytes(), random.Random(number))[:200])
        bad.add(f"bad{number}")
        lines.insert(4 * number, row | {"id": f"bad{number}", "target": f"bad{number}.mp4"})
    path = folder / "mixed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, bad


def read(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Every record by its id; one that is there twice is an error."""
    from configs import stage1

    opened = records.Records(folder, stage1.get_config("smoke"))
    found = [opened[index] for index in range(len(opened))]
    ids = [record["id"].decode() for record in found]
    if len(set(ids)) != len(ids):
        raise RuntimeError(f"{folder}: records are there twice: {ids}")
    return dict(zip(ids, found, strict=True))


def compared(found: dict, expected: dict, out: Path, bad: set[str], when: str) -> list[str]:
    rejected = {json.loads(line)["id"] for line in (out / "rejected.jsonl").read_text().splitlines()}
    wrong = [] if list(found) == list(expected) else [f"{when}: records {list(found)} instead of {list(expected)}"]
    wrong += [f"{when}: {name} differs" for name in found if name in expected and not all(
        np.array_equal(found[name][key], expected[name][key]) for key in expected[name]
    )]  # fmt: skip
    return wrong + ([] if rejected == bad else [f"{when}: {rejected} are refused instead of {bad}"])
