"""Any request ends in 0 or 2 and at most two lines on stderr: 1,000 random ones, drawn from a fixed seed.

As many as one likes: REQUEST_FUZZ=10000 python -m pytest -n 0 -o faulthandler_timeout=0 tests/launch/test_requests.py
"""

import io
import json
import os
import random
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
from PIL import Image

from data_pipelines import example, records
from data_pipelines.encoders import Encoders
from launch import command, encode, encode_world, export, import_weights, sample, train
from omnitransfer_jax import tasks

SMALL = ("stage1:smoke", "stage3:smoke", "wan:tiny", "wan:smoke", "ditflow:smoke")
CONFIGS = (*SMALL * 4, "stage1", "wan:t2v_1_3b", "vae:tiny", "wan:none", "mllm")
INTS, REALS = ("0", "-1", "1", "2", "3", "8", "10" * 20, "x", ""), ("0", "-1", "0.5", "1", "1e30", "nan", "inf", "x")
TEXTS = ("", "x", "a cat " * 200, "é\u200b", "<|image_pad|>", "/", "no/such/folder", "embedded")
PATTERNS = (".*", "dit/.*", "(", "a{99999999999}", "(?i)dit/.*", "")
VALUES = (None, 0, -1, 1.5, 1e300, float("nan"), True, "", "x", "no.mp4", [], {}, {"reference": 1}, {"reference": "x"}, "\ud800", "é" * 500)


def random_value(draw, hint):
    """A value of a field, right or wrong, as it stands on the command line."""
    if get_origin(hint) is Literal:
        return [draw.choice([*map(str, get_args(hint)), "x"])]
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return [draw.choice(PATTERNS) if kind is str else random_value(draw, kind)[0] for _ in range(draw.randrange(5))]
    return [draw.choice({int: INTS, float: REALS, bool: ("True", "False", "x"), str: TEXTS}.get(hint, (*INTS, "None")))]


def random_fields(draw, config):
    try:
        types = command._field_types(command.load_config(config))
    except command.RequestError:
        return []
    chosen = draw.sample(sorted(types), draw.choice([0, 0, 1, 1, 2]))
    wrong = [*[[]] * 20, ["--no.such=1"], ["word"], ["--seed"]]
    return [arg for name in chosen for arg in (f"--{name}", *random_value(draw, types[name]))] + draw.choice(wrong)


def random_manifest(draw, folder):
    """Lines of a manifest with up to two things wrong, or bytes that are none."""
    rows = []
    for row in map(json.loads, (folder / "clips" / "manifest.jsonl").read_text().splitlines()[: draw.choice([1, 1, 2])]):
        for _ in range(draw.choice([0, 0, 0, 0, 1, 2])):
            key = draw.choice([*row, "start", "end", "first_frame", "more"])
            row[key] = draw.choice([*VALUES, *row.values()])
        rows.append(json.dumps(row))
    text = draw.choice([*["\n"] * 9, "\n\n", ",", ""]).join(rows)
    text = draw.choice([*[text] * 9, text[: draw.randrange(len(text))], json.dumps([text]), "\ufeff" + text])
    path = folder / "clips" / "random.jsonl"
    path.write_bytes(draw.choice([text.encode("utf-8", "surrogatepass")] * 15 + [draw.randbytes(40)]))
    return path


def random_request(draw, folder):
    """(command, arguments)."""
    config, out = draw.choice(CONFIGS), folder / f"out{draw.randrange(10**9)}"
    module = draw.choices([train, sample, encode, export, import_weights], [1, 5, 5, 2, 2])[0]
    clip, picture = folder / "clips" / "id_target.mp4", folder / "picture.png"
    paths = [folder / "clips", clip, picture, folder / "empty", folder / "absent", folder / "clips" / "manifest.jsonl"]
    if module is import_weights:
        return module, [f"--source={draw.choice(paths)}", f"--out={out}", f"--dtype={draw.choice(['keep'] * 4 + ['float16'])}"]
    args = [f"--config={config}", *random_fields(draw, config)]
    if module is train:
        return module, [*args, "--dry_run"]
    if module is export:
        return module, [*args, f"--checkpoint={draw.choice([*paths, 'embedded', ''])}", f"--out={out}"]
    if module is encode:
        return module, [*args, f"--manifest={random_manifest(draw, folder)}", f"--out={out}", f"--shard_count={draw.choice([*[1] * 9, 0])}"]
    for _ in range(draw.choice([0, 1, 1, 2])):
        task, reference = draw.choice([*["id", "style"] * 4, "motion", "x"]), draw.choice([*[clip] * 20, *paths])
        args += [f"--task={task}", f"--reference={reference}"][: draw.choice([2] * 9 + [1])]
    args += draw.choice(
        [[], [f"--first_frame={draw.choice([*[picture] * 9, *paths])}"], ["--checkpoint=embedded"], ["--checkpoint=absent"]]
    )
    return module, [*args, f"--prompt={draw.choice(TEXTS)}", f"--out={draw.choice([f'{out}.mp4'] * 20 + ['x.gif', ''])}"]


@pytest.fixture
def without_networks(monkeypatch):
    """The commands with everything but the networks."""

    @contextmanager
    def shard(path, features):
        yield lambda record: None
        path.touch()

    monkeypatch.setattr(sample, "encode", lambda encoders, request: None)
    monkeypatch.setattr(sample, "generate", lambda encoders, request, encoded, finish: np.zeros((1, 1)))
    monkeypatch.setattr(Encoders, "decode", lambda self, latents: np.zeros((1, 1, 16, 16, 3), np.float32))
    monkeypatch.setattr(Encoders, "load", lambda self: None)
    monkeypatch.setattr(Encoders, "text", lambda self, prompts: (np.zeros((1, 1, 1), np.float32), np.ones(1, int)))
    monkeypatch.setattr(encode, "encode_together", lambda found, encoders: [None] * len(found))
    monkeypatch.setattr(records, "shard_writer", shard)
    monkeypatch.setattr(records, "finish", lambda folder, config, lengths, ids: None)


@pytest.mark.usefixtures("without_networks")
def test_a_prompt_that_is_cut_is_said_for_each_pair(tmp_path, capsys):
    manifest = example.write_example(tmp_path / "clips")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["prompt"] = 99 * "x"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    args = ["--config=stage3:smoke", "--dit.text_len=64", f"--manifest={manifest}", f"--out={tmp_path / 'records'}"]
    assert command.execute(encode.main, encode.FLAGS, [*args, "--alignment.prompt_tokens=150"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "cut off" in line]
    mllm = len(tasks.TASKS[0].template) + 100
    assert said == [
        f"{rows[0]['id']}: prompt has 100 tokens: 64 are read (dit.text_len), the end is cut off",
        f"{rows[0]['id']}: prompt has {mllm} tokens: 150 are read (alignment.prompt_tokens), the end is cut off",
    ]


@pytest.mark.parametrize("module", [encode, encode_world])
def test_encoding_at_full_size_needs_weights(module, tmp_path, capsys):
    manifest = example.write_example(tmp_path / "clips")
    args = ["--config=stage1", f"--out={tmp_path / 'records'}", *([f"--manifest={manifest}"] if module is encode else [])]
    assert command.execute(module.main, module.FLAGS, args) == 2
    error = capsys.readouterr().err
    assert "--train.init_from='' has no weights for text (5.7 billion parameters) and image (0.6 billion parameters)" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "records").exists()


@pytest.mark.usefixtures("without_networks")
def test_random_requests(tmp_path):
    example.write_example(tmp_path / "clips")
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(tmp_path / "picture.png")
    draw, ends = random.Random(14), Counter()
    for number in range(int(os.environ.get("REQUEST_FUZZ", 1_000))):
        module, args = random_request(draw, tmp_path)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
            try:
                code = command.execute(module.main, module.FLAGS, args)
            except BaseException as error:
                raise AssertionError(f"request {number}: {module.__name__} {args}") from error
        lines = [line for line in errors.getvalue().split("\n") if line and "\r" not in line]
        assert code in (0, 2), f"request {number}: {module.__name__} {args}: {code} {lines}"
        assert len(lines) <= (2 if code else 0), f"request {number}: {module.__name__} {args}: {lines}"
        ends[module.__name__, code] += 1
    both = [ends[module.__name__, code] for module in (train, sample, encode) for code in (0, 2)]
    assert min(both) > 15, ends  # right and wrong requests
