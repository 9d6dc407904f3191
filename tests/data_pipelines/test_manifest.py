"""The manifest: what a row holds, one message with all that is wrong by file and line, and pairs that would teach copying."""

import json

import numpy as np
import pytest

from configs.errors import RequestError
from data_pipelines.manifest import Clip, Row, read_manifest, refuse_same

ROW = {"id": "a", "task": "motion", "reference": "clips/r.mp4", "target": "clips/t.mp4", "prompt": "a kite"}


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "manifest.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    return write


def test_rows(write, tmp_path):
    path = write(
        "\ufeff" + json.dumps(ROW),
        "",
        {**ROW, "id": "b", "first_frame": "f.png", "start": 1, "end": {"target": 4.5}},
        {**ROW, "id": "c", "task": "id", "start": {"reference": 2.5}, "target": "/else/where.mp4"},
    )
    r, t = tmp_path / "clips/r.mp4", tmp_path / "clips/t.mp4"
    assert read_manifest(path) == [
        Row("a", "motion", Clip(r), Clip(t), "a kite"),
        Row("b", "motion", Clip(r, 1), Clip(t, 1, 4.5), "a kite", tmp_path / "f.png"),
        Row("c", "id", Clip(r, 2.5), Clip(tmp_path / "/else/where.mp4"), "a kite"),
    ]


def without(key):
    return {name: value for name, value in ROW.items() if name != key}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON (Expecting property name"),
        ("[" * 100_000, "not JSON (maximum recursion depth"),
        ("3", "3: not an object; give {id, task, reference, target, prompt}"),
        (without("prompt"), "prompt is absent; every row needs id, task"),
        ({**ROW, "caption": "x"}, '"caption": no such key; there are id, task, reference, target, prompt, first_frame, start, end'),
        ({**ROW, "task": "dance"}, 'task "dance": not one of id, style, motion, camera, effect'),
        ({**ROW, "task": ["id"]}, 'task ["id"]: not one of'),
        ({**ROW, "id": 3}, "id 3: not a name"),
        ({**ROW, "target": ""}, 'target "": not a path'),
        ({**ROW, "target": "a\0b"}, r'target "a\u0000b": not a path'),
        ('{"id": "a", "task": "id", "reference": "r", "target": "\\ud800", "prompt": ""}', r'target "\ud800": not a path'),
        ({**ROW, "prompt": None}, 'prompt null: not a text; "" is none'),
        ({**ROW, "start": -1}, "start -1: seconds from 0 on"),
        ({**ROW, "start": True}, "start true: seconds from 0 on"),
        ({**ROW, "end": float("nan")}, "end NaN: seconds from 0 on"),
        ({**ROW, "end": 10**400}, "end 1000"),
        ({**ROW, "end": {"video": 1}}, 'end {"video": 1}: seconds from 0 on'),
        ({**ROW, "start": 2, "end": {"target": 2}}, "end 2 of the target: not after its start 2"),
        ({**ROW, "task": "style", "first_frame": "f.png"}, "first_frame: style starts from none; leave it out"),
    ],
)
def test_a_wrong_line_is_told_by_its_number(write, line, message):
    path = write({**ROW, "id": "first"}, line)
    with pytest.raises(RequestError) as error:
        read_manifest(path)
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_all_wrong_lines_are_told_at_once(write):
    path = write(ROW, {**ROW, "task": "dance", "id": 3}, "{", ROW)
    with pytest.raises(RequestError) as error:
        read_manifest(path)
    places = [part.split(": ")[0] for part in str(error.value).split("; ") if part.startswith(str(path))]
    assert places == [f"{path}:2", f"{path}:2", f"{path}:3", f"{path}:4"]
    assert f'{path}:4: id "a": line 1 has it too' in str(error.value)


def test_a_message_is_short_however_much_is_wrong(write):
    """A JSON array over many lines, a manifest of another kind, a row of many keys."""
    array = json.dumps([{**ROW, "id": str(i)} for i in range(2_000)], indent=2)
    for lines, words in (
        ((array,), ": a JSON array; give one object a line"),
        (("id,task,reference",) * 2_000, "; and 1992 more problems"),
        (({**ROW} | {f"key{i}": 0 for i in range(2_000)},), "; and 1992 more problems"),
        (({**ROW, "id": "a" * 10_000},) * 2, "line 1 has it too"),
    ):
        with pytest.raises(RequestError) as error:
            read_manifest(write(*lines))
        assert words in str(error.value)
        assert len(str(error.value)) < 3_000


def test_no_manifest(write, tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff")
    for path, words in {tmp_path / "absent": "No such file", tmp_path: "Is a directory", tmp_path / "latin": "invalid"}.items():
        with pytest.raises(RequestError, match=rf"^{path}: not a manifest that can be read \(.*{words}"):
            read_manifest(path)
    with pytest.raises(RequestError, match="no rows"):
        read_manifest(write())


def test_no_line_causes_anything_but_a_message(tmp_path):
    """500 rows with a few characters changed."""
    rng, line = np.random.default_rng(0), json.dumps({**ROW, "start": {"target": 1}, "end": 3, "first_frame": "f"})
    path, messages = tmp_path / "m", []
    for _ in range(500):
        characters = list(line)
        for place in rng.integers(0, len(line), 2):
            characters[place] = str(rng.choice(list('{}[]":,0129eE.-\\u nulltrue\0é')))
        path.write_text("".join(characters))
        try:
            read_manifest(path)
        except RequestError as error:
            messages.append(str(error))
    assert 0 < len(messages) < 500
    assert all(message.startswith(f"{path}:") for message in messages)


def pair(reference, target, start=(0.0, 0.0)):
    return Row("a", "id", Clip(reference, start[0]), Clip(target, start[1]), "")


def test_a_pair_of_one_clip_is_refused(tmp_path):
    a, copy, other, link = (tmp_path / name for name in ("a", "copy", "other", "link"))
    a.write_bytes(b"123")
    copy.write_bytes(b"123")
    other.write_bytes(b"124")
    link.symlink_to(a)
    for target in (a, copy, link, tmp_path / "x" / ".." / "a"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(RequestError, match=f"^{target}: the same clip as the reference"):
            refuse_same(pair(a, target))
        refuse_same(pair(a, target, (0.0, 2.0)))
    refuse_same(pair(a, other))
    refuse_same(pair(a, tmp_path / "absent"))
