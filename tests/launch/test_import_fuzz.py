"""Configurations, index files and headers with random damage: import answers each in one line, or imports what was there.

200 of them here. All 2,000 of the release check: IMPORT_FUZZ=2000 python -m pytest -n 0 tests/launch/test_import_fuzz.py
"""

import json
import os
import random
import struct
from collections import Counter

import numpy as np
import pytest

from launch import command, import_weights
from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.weights.parts import MLLM, PARTS
from tests.made_weights import random_leaves, write_part

COUNT = int(os.environ.get("IMPORT_FUZZ", "200"))
VALUES = [
    None, True, False, -1, 0, 1, 3, 3.5, 1e308, float("nan"), float("-inf"), "", "x", "48", "F8_E4M3", "F64", "Q4_K", [], {}, [1], [[]],
    [-1, 2], [None], {"a": 1}, 2**20, 2**31, 2**63, 10**30, 10**6, "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "x" * 300,
    [2**40, 2**40, 2**40],
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Of each part a folder in the diffusers layout, in shards with an index, and its leaves."""
    found = {}
    for part in (*PARTS, MLLM):
        folder, leaves = tmp_path_factory.mktemp(part.name), random_leaves(part)
        found[part.name] = folder, write_part(folder, part, leaves, shards=2), leaves
    return found


def places(tree, path=()):
    """The paths of everything inside a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def change_json(tree, draw):
    """One value of a JSON tree replaced, removed, renamed, wrapped or doubled."""
    paths = list(places(tree))
    if not paths or draw.random() < 0.03:
        return draw.choice(VALUES)
    *outer, key = draw.choice(paths)
    holder = tree
    for step in outer:
        holder = holder[step]
    action = draw.choice(["replace", "replace", "replace", "remove", "wrap", "rename", "nudge"])
    if action == "remove":
        del holder[key]
    elif action == "rename" and isinstance(holder, dict):
        holder[draw.choice(["", "x", f"{key}x", "dtype", "__metadata__", "weight_map"])] = holder.pop(key)
    elif action == "nudge" and isinstance(holder[key], int | float):
        holder[key] += draw.choice([-1, 1, 4, 0.5])
    else:
        holder[key] = [holder[key]] if action == "wrap" else draw.choice(VALUES)
    return tree


def change_text(text, draw):
    """One change of a text that need not leave it JSON."""
    action, at = draw.choice(["cut", "flip", "insert", "nest", "empty", "twice"]), draw.randrange(len(text))
    if action == "cut":
        return text[:at]
    if action == "flip":
        return text[:at] + bytes([text[at] ^ 1 << draw.randrange(8)]) + text[at + 1 :]
    if action == "insert":
        return text[:at] + draw.choice([b"\0", b"\xff\xfe", b'"', b"{", b",", b"-", b"9" * 5000]) + text[at:]
    return {"nest": b"[" * 100_000, "empty": b"", "twice": text + text}[action]


def changed(content, is_header, draw):
    """The bytes of a file with one change: of its JSON, of its text, or of the length of its header."""
    length = struct.unpack("<Q", content[:8])[0] if is_header else len(content)
    text, rest = (content[8 : 8 + length], content[8 + length :]) if is_header else (content, b"")
    kind = draw.random()
    if is_header and kind < 0.1:
        wrong = draw.choice([0, 1, length - 1, length + 1, length + 8, 2**63, 2**64 - 1, 10**8, draw.randrange(2**64)])
        return struct.pack("<Q", wrong) + content[8:]
    if is_header and kind < 0.15:
        return content[: draw.randrange(len(content))]
    text = json.dumps(change_json(json.loads(text), draw)).encode() if kind < 0.75 else change_text(text, draw)
    return struct.pack("<Q", len(text)) + text + rest if is_header else text


def test_damage_is_told_in_one_line_and_writes_nothing(sources, tmp_path, monkeypatch, capfd):
    """A harmless change, as of a key that nothing reads, imports the same bits. Orbax is left out: it would take most of the time."""
    written, codes = {}, Counter()

    def save_part(folder, name, leaves):
        (folder / name).mkdir(parents=True)
        written.update({path: leaf.copy() for path, leaf in leaves})

    monkeypatch.setattr(model_folder, "save_part", save_part)
    for number in range(COUNT):
        draw = random.Random(number)
        folder, place, leaves = sources[draw.choice(list(sources))]
        file = draw.choice([place / "config.json", *sorted(place.glob("*.index.json")), *sorted(place.glob("*.safetensors"))])
        content, out = file.read_bytes(), tmp_path / str(number)
        file.write_bytes(changed(content, file.suffix == ".safetensors", draw))
        try:
            code = command.execute(import_weights.main, import_weights.FLAGS, [f"--source={folder}", f"--out={out}"])
        except Exception as error:
            raise AssertionError(f"change {number}, of {file}") from error
        finally:
            file.write_bytes(content)
        line, codes[code] = capfd.readouterr().err, codes[code] + 1
        assert (code, line.count("\n")) in ((0, 0), (2, 1)), (number, file, code, line)
        assert (code == 0) == out.exists(), number
        if code == 0:
            assert written.keys() == leaves.keys(), number
            assert all(np.array_equal(written[path], leaves[path]) for path in leaves), number
        written.clear()
    assert codes[2] > COUNT / 2
    assert codes[0] > 0
    print(f"{COUNT} changes: {codes[2]} refused, {codes[0]} harmless")
