"""Every command, with the requests that go wrong everywhere: a flag, an input that is not there, an output that is no place to write.

Each ends in exit code 2, `--help` in 0, with at most two lines on stderr, before anything is computed or changed. All of them run in this
process, and one of each command as a process of its own. All as processes, two at a time, with their figures:

    OMNITRANSFER_ALL_PROCESSES=1 python -m pytest -n 0 -s tests/launch/test_every_command.py -k all_as_processes
"""

import ast
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import pytest
from PIL import Image

from configs import mllm, stage0, stage1, vae
from configs.run import CheckpointConfig
from data_pipelines import clips, example, records
from launch import command
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import model_folder, run_folder
from tests.folders.test_run_folder import State

ROOT = Path(__file__).parents[2]
PACKAGES = ("omnitransfer_jax", "data_pipelines", "world", "evaluation", "launch", "benchmarks")
LINES, SECONDS = 2, 10  # on stderr; of a process


class Command(NamedTuple):
    """A request that is right as far as is checked before weights are read; {} stands for the folder that `place` makes."""

    args: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    """The flags that name what is read."""
    output: str = ""
    """The flag that names what is written."""
    ends: str = ""
    """How the name of an output ends; empty if it is a folder."""


STAGE1, TINY = "--config=stage1:smoke", "--config=stage0:tiny"
CLIP, FRAME = "--reference={}/clips/style_reference.mp4", "--first_frame={}/picture.png"
COMMANDS: dict[str, tuple[Command, ...]] = {
    "launch.sample": (
        Command((STAGE1, "--checkpoint={}/run", "--task=style", CLIP, FRAME, "--out={}/new.mp4"),
                ("--checkpoint", "--reference", "--first_frame"), "--out", ".mp4"),
        Command((STAGE1, "--train.init_from={}/model", "--out={}/new.mp4"), ("--train.init_from",), "--out", ".mp4"),
    ),
    "launch.encode": (
        Command((STAGE1, "--manifest={}/clips/manifest.jsonl", "--train.init_from={}/model", "--out={}/new"),
                ("--manifest", "--train.init_from"), "--out"),
    ),
    "launch.encode_world": (
        Command(("--config=stage3:smoke", "--train.init_from={}/model", "--out={}/new"), ("--train.init_from",), "--out"),
    ),
    "launch.export": (Command((STAGE1, "--checkpoint={}/run", "--out={}/new"), ("--checkpoint",), "--out"),),
    "launch.import_weights": (Command(("--source={}/source", "--out={}/new"), ("--source",), "--out"),),
    "launch.train": (
        Command((STAGE1, "--data.path={}/records", "--train.init_from={}/run", "--workdir={}/new"),
                ("--data.path", "--train.init_from"), "--workdir"),
        Command(("--config=vae:tiny", "--workdir={}/new"), (), "--workdir"),
        Command(("--config=mllm:tiny", "--train.init_from={}/model", "--workdir={}/new"), ("--train.init_from",), "--workdir"),
    ),
    "launch.embed": (
        Command((TINY, "--base={}/base", "--vae={}/vae", "--mllm={}/mllm", "--out={}/new"), ("--base", "--vae", "--mllm"), "--out"),
    ),
    "launch.demo": (Command(("--out={}/new",), (), "--out"),),
    "benchmarks.ablation": (Command(("--out={}/new",), (), "--out"), Command(("--docs={}/new", "--out={}/empty"), (), "--docs")),
    "benchmarks.import_memory": (Command(("--folder={}/new",), (), "--folder"),),
    "benchmarks.dit_step": (Command(),),
    "benchmarks.reference_cache": (Command(),),
    "data_pipelines.example": (Command(("--out={}/new",), (), "--out"),),
}  # fmt: skip


class Request(NamedTuple):
    module: str
    what: str
    args: tuple[str, ...]


def requests() -> Iterator[Request]:
    """Every command with everything that can be wrong in each of its requests."""
    for module, commands in COMMANDS.items():
        yield Request(module, "help", ("--help",))
        for number, each in enumerate(commands, start=1):
            given = dict(arg.split("=", 1) for arg in each.args)

            def changed(what: str, flag: str, value: str, module=module, number=number, given=given) -> Request:
                return Request(module, f"{number} {what}", tuple(f"{name}={v}" for name, v in (given | {flag: value}).items()))

            yield changed("wrong flag", "--no_such_flag", "1")
            for flag in each.inputs:
                yield changed(f"no {flag}", flag, "{}/absent/x")
            if each.output:
                bad = ["{}/file/x", "/proc/x", "/sys/x", f"{{}}/{'x' * 300}"]
                for value in [*(name + each.ends for name in bad), *([] if each.output == "--docs" else [""])]:  # no --docs: those of --out
                    yield changed(f"output {value[:12]}", each.output, value)
                yield changed("output a file or folder", each.output, "{}/folder.mp4" if each.ends else "{}/file")
                for flag in each.inputs:
                    for link in ("", "link_", "relative_"):
                        yield changed(f"output {link}{flag}", each.output, given[flag].replace("{}/", f"{{{link}}}/"))
                if "--reference" in each.inputs:
                    yield changed("output a hard link", each.output, "{}/hard.mp4")


REQUESTS = list(requests())
NAMES = [f"{each.module} {each.what}" for each in REQUESTS]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Inputs of every command, as far as they are read before weights are: small, and without parameters."""
    folder = tmp_path_factory.mktemp("place")
    smoke, tiny = stage1.get_config("smoke"), stage0.get_config("tiny")
    example.write_example(folder / "clips")
    os.link(folder / "clips" / "style_reference.mp4", folder / "hard.mp4")
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(folder / "picture.png")
    (folder / "file").write_text("a file")
    for name in ("empty", "folder.mp4"):
        (folder / name).mkdir()
    model_folder.write_model(folder / "model", {name: getattr(smoke, name) for name in ("dit", "vae", "text", "image", "mllm")})
    for name in ("tokenizer", "mllm_tokenizer"):
        (folder / "model" / name).mkdir()
        (folder / "model" / name / "tokenizer.json").write_text("{}")
    write_run(folder / "run", smoke, folder / "model")
    write_run(folder / "base", tiny, "embedded")
    write_run(folder / "mllm", mllm.TINY, "embedded")
    write_run(folder / "vae", vae.TINY, "")
    (folder / "mllm" / "mllm.json").write_text("{}")
    (folder / "vae" / "vae.json").write_text(json.dumps({"vae": asdict(tiny.vae)}))
    records.begin(folder / "records", smoke, {})
    (folder / "source" / "transformer").mkdir(parents=True)
    (folder / "source" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(8))
    (folder / "links").symlink_to(folder)
    return folder


def write_run(folder: Path, config: Any, origin: str | Path) -> None:
    """A run of a training with one checkpoint, which has no parameters."""
    run_folder.write_config(folder, replace(config, train=replace(config.train, init_from=str(origin))))
    number = np.array(8)
    with run_folder.open_checkpoints(folder, CheckpointConfig()) as checkpoints:
        data = iter(grain.MapDataset.range(3).to_iter_dataset())
        run_folder.save(checkpoints, 8, State(number, {"dit.a": np.ones(2)}, {}, {}, {}, number), data)


def filled(request: Request, place: Path) -> list[str]:
    """The arguments with the paths of the inputs, by way of a link or from the current folder where it is asked for."""
    paths = {"{}": str(place), "{link_}": str(place / "links"), "{relative_}": os.path.relpath(place)}
    args = list(request.args)
    for mark, path in paths.items():
        args = [arg.replace(mark, path) for arg in args]
    return args


def contents(place: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, and the folders."""
    found = [Path(folder, name) for folder, folders, names in os.walk(place) for name in (*folders, *names)]
    return {str(path): (0, 0) if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def check(request: Request, code: int, stderr: str) -> None:
    lines = stderr.splitlines()
    assert code == (0 if request.what == "help" else 2), f"{code}: {stderr[-2000:]}"
    assert len(lines) == 0 if request.what == "help" else 1 <= len(lines) <= LINES, stderr


def skip_without_torch(module: str) -> None:
    if module == "benchmarks.dit_step":
        pytest.importorskip("torch")
        pytest.importorskip("diffusers")


def test_every_command_is_here():
    """Whatever can be started with `python -m`."""

    def is_started(tree: ast.Module) -> bool:
        return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body)

    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    started = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if is_started(ast.parse(path.read_text()))}
    assert started == set(COMMANDS)


@pytest.fixture
def without_work(monkeypatch):
    """A request that is wrong may read no weights, decode no clip and render none."""

    def work(*args, **kwargs):
        raise AssertionError("something is computed before the request is checked")

    for module, name in ((load_models, "_load"), (load_models, "_load_trained"), (model_folder, "_read"), (run_folder, "load_params")):
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr(clips, "write_clip", work)


@pytest.mark.usefixtures("without_work")
@pytest.mark.parametrize("request_", REQUESTS, ids=NAMES)
def test_a_wrong_request(request_, place, monkeypatch, capfd):
    skip_without_torch(request_.module)
    module, args, before = importlib.import_module(request_.module), filled(request_, place), contents(place)
    if hasattr(module, "FLAGS"):
        code = command.execute(module.main, module.FLAGS, args)
    else:
        monkeypatch.setattr(sys, "argv", ["example", *args])
        with pytest.raises(SystemExit) as end:
            module.main()
        code = end.value.code
    check(request_, code, capfd.readouterr().err)
    assert contents(place) == before


class Ended(NamedTuple):
    code: int
    stderr: str
    seconds: float
    """Of computing, the process and its threads; the machine may be busy with other things."""


def as_process(request: Request, place: Path) -> Ended:
    with tempfile.TemporaryFile() as errors:
        args = [sys.executable, "-m", request.module, *filled(request, place)]
        process = subprocess.Popen(args, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        return Ended(process.returncode, errors.read().decode(), used.ru_utime + used.ru_stime)


@pytest.mark.parametrize("module", COMMANDS)
def test_the_process_ends_as_the_function_does(module, place):
    skip_without_torch(module)
    wrong = [each for each in REQUESTS if each.module == module and each.what in ("1 wrong flag", "1 output /proc/x")][-1]
    before, ended = contents(place), as_process(wrong, place)
    check(wrong, ended.code, ended.stderr)
    assert ended.seconds < SECONDS
    assert contents(place) == before


@pytest.mark.skipif("OMNITRANSFER_ALL_PROCESSES" not in os.environ, reason="takes minutes; OMNITRANSFER_ALL_PROCESSES=1 runs it")
def test_all_as_processes(place):
    before = contents(place)
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda each: as_process(each, place), REQUESTS))
    slowest = max(zip(ended, NAMES, strict=True), key=lambda pair: pair[0].seconds)
    most = max(len(each.stderr.splitlines()) for each in ended)
    print(f"\n{len(ended)} processes; slowest {slowest[0].seconds:.1f} s of computing ({slowest[1]}); at most {most} lines on stderr")
    for request, each in zip(REQUESTS, ended, strict=True):
        check(request, each.code, each.stderr)
        assert each.seconds < SECONDS, request
    assert contents(place) == before
