"""Every command, with the requests that go wrong everywhere: a flag, an input that is not there, an output that is no place to write.

Each ends in exit code 2, `--help` in 0, with at most two lines on stderr, before anything is computed or changed. All of them run in this
process, and one of each command as a process of its own. All as processes, two at a time, with their figures:

    OMNITRANSFER_ALL_PROCESSES=2 python -m pytest -n 0 -s -o faulthandler_timeout=0 tests/launch/test_every_command.py -k all_as_processes
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

import configs
from configs import mllm, stage0, stage1, vae, wan
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
    "launch.compile": (Command((STAGE1, "--topology=v5p:2x2x1", "--json={}/new.json"), (), "--json", ".json"),),
    "launch.sweep": (Command((STAGE1, "--space={}/space.toml", "--trials=2", "--out={}/new"), ("--space",), "--out"),),
    "launch.recipe": (Command((STAGE1, "--target=slurm", "--workdir=/shared/run", "--out={}/new"), (), "--out"),),
    "launch.evaluate": (
        Command((STAGE1, "--checkpoint={}/run", "--suite=world:2", "--out={}/new"), ("--checkpoint", "--suite"), "--out"),
    ),
    "launch.study": (
        Command(("--scores={}/evaluated", "--out={}/new"), ("--scores",), "--out"),
        Command(("--answers={}/empty", "--out={}/study"), ("--answers",)),
    ),
    "launch.demo": (Command(("--out={}/new",), (), "--out"),),
    "benchmarks.ablation": (Command(("--out={}/new",), (), "--out"), Command(("--docs={}/new", "--out={}/empty"), (), "--docs")),
    "benchmarks.import_memory": (Command(("--folder={}/new",), (), "--folder"),),
    "benchmarks.dit_step": (Command(),),
    "benchmarks.reference_cache": (Command(),),
    "benchmarks.guidance_memory": (Command(),),
    "benchmarks.loader": (Command(),),
    "benchmarks.cached_step": (Command(),),
    "benchmarks.motion_methods": (Command(("--out={}/new",), (), "--out"),),
    "data_pipelines.example": (Command(("--out={}/new",), (), "--out"),),
    "data_pipelines.public": (
        Command(("--layout=vap_data", "--root={}/published", "--out={}/new.jsonl"), ("--root",), "--out", ".jsonl"),
    ),
}  # fmt: skip

CHILDREN = {"data_pipelines.decoding"}  # started by others alone


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
    (folder / "space.toml").write_text("[fields]\noptimizer.learning_rate = {log = [1e-4, 1e-2]}\n")
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
    (folder / "published").mkdir()
    (folder / "published" / "vap_data.csv").write_text("video_paths,kind,ref_video_paths,split\na.mp4,cake,[],train\n")
    evaluated = {"config": "stage1:smoke", "suite": {"name": "world:2", "sha256": None}, "video": asdict(smoke.video)}
    for name, content in {
        "evaluated/settings": {},
        "evaluated/environment": evaluated,
        "study/key": {"study": "", "systems": [], "pages": {}},
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
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
    if module in ("benchmarks.dit_step", "benchmarks.cached_step"):
        pytest.importorskip("torch")
        pytest.importorskip("diffusers")


def test_every_command_is_here():
    """Whatever can be started with `python -m`."""

    def is_started(tree: ast.Module) -> bool:
        return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body)

    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    started = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if is_started(ast.parse(path.read_text()))}
    assert started - CHILDREN == set(COMMANDS)


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
        code = execute(request_.module, args)
    else:
        monkeypatch.setattr(sys, "argv", ["example", *args])
        with pytest.raises(SystemExit) as end:
            module.main()
        code = end.value.code
    check(request_, code, capfd.readouterr().err)
    assert contents(place) == before


def execute(module: str, args: tuple[str, ...] | list[str]) -> int:
    imported = importlib.import_module(module)
    return command.execute(imported.main, imported.FLAGS, args)


WEIGHTS = ("--checkpoint", "--train.init_from")
TAKE_WEIGHTS = [
    (module, each, flag) for module, commands in COMMANDS.items() for each in commands for flag in each.inputs if flag in WEIGHTS
]


@pytest.mark.usefixtures("without_work")
@pytest.mark.parametrize(("module", "each", "flag"), TAKE_WEIGHTS, ids=[f"{m} {f} {c.args[0]}" for m, c, f in TAKE_WEIGHTS])
def test_a_folder_that_holds_no_weights_is_named(module, each, flag, place, capfd):
    give = f"give {flag}=DIR, a folder of launch.import_weights or the workdir of a training"
    home = f"inside of the workdir of a run; give {flag}={place}/run"
    for name, message in {
        "absent": f"no such folder; {give}",
        "file": f"a file; {give}",
        "source/transformer/diffusion_pytorch_model.safetensors": "a file of weights; import it: python -m launch.import_weights",
        "source/transformer": "published weights that are not imported; import it: python -m launch.import_weights",
        "empty": f"an empty folder; {give}",
        "records": f"a folder of records, for --data.path; {give}",
        "run/checkpoints": home,
        "run/checkpoints/8": home,
        "model/tokenizer": f"inside of a folder of imported weights; give {flag}={place}/model",
    }.items():
        args = dict(arg.split("=", 1) for arg in each.args) | {flag: f"{place}/{name}"}
        assert execute(module, [f"{key}={value}".replace("{}", str(place)) for key, value in args.items()]) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"{flag}={place}/{name}: {message}")
        assert error.count("\n") == 1


@pytest.mark.usefixtures("without_work")
@pytest.mark.parametrize(("module", "each", "flag"), TAKE_WEIGHTS, ids=[f"{m} {f} {c.args[0]}" for m, c, f in TAKE_WEIGHTS])
def test_weights_of_another_function_are_named_before_any_are_read(module, each, flag, place, tmp_path, capfd):
    """Of a model folder and of a run; with the field, both values, and the configuration that fits."""
    made = wan.get_config("t2v_1_3b")
    model_folder.write_model(tmp_path / "t2v", {"dit": made.dit, "vae": made.vae})
    write_run(tmp_path / "run", made, tmp_path / "t2v")
    by_run = module in ("launch.sample", "launch.evaluate", "launch.export") or "data.path" in str(
        each.args
    )  # the others read what it started from
    for folder, words in (
        ("t2v", ": made with dit.dim=1536, the configuration has "),
        ("run", f": the run in {tmp_path}/run has 1536; " if by_run else f"{tmp_path}/t2v: made with dit.dim=1536, "),
    ):
        args = dict(arg.split("=", 1) for arg in each.args) | {flag: f"{tmp_path}/{folder}"}
        assert execute(module, [f"{key}={value}".replace("{}", str(place)) for key, value in args.items()]) == 2
        error = capfd.readouterr().err
        assert words in error
        assert error.endswith("; what fits is --config=wan:t2v_1_3b\n")


@pytest.mark.parametrize("module", ["launch.sample", "launch.encode", "launch.encode_world", "launch.export", "launch.embed"])
@pytest.mark.parametrize("name", ["vae:tiny", "mllm:tiny", "mllm", "vae:x"])
def test_a_configuration_of_another_kind_is_named(module, name, place, capfd):
    args = [arg.replace("{}", str(place)) for arg in COMMANDS[module][0].args if not arg.startswith("--config")]
    assert execute(module, [f"--config={name}", *args]) == 2
    assert capfd.readouterr().err == f"--config={name}: the configuration of another command; take {', '.join(of_the_transformer())}\n"


def of_the_transformer() -> list[str]:
    """The configurations of runs but those of the world's autoencoder and language model."""
    modules = (importlib.import_module(f"configs.{path.stem}") for path in Path(configs.__file__).parent.glob("*.py"))
    return sorted({module.__name__.removeprefix("configs.") for module in modules if hasattr(module, "get_config")} - {"vae", "mllm"})


def test_a_run_of_another_training_does_not_go_on(place, capfd):
    for config, workdir in (("stage1:smoke", "vae"), ("vae:tiny", "mllm"), ("mllm:tiny", "run")):
        assert execute("launch.train", [f"--config={config}", f"--workdir={place / workdir}"]) == 2
        assert "'s training; give one of the " in capfd.readouterr().err


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


@pytest.mark.skipif(
    "OMNITRANSFER_ALL_PROCESSES" not in os.environ, reason="takes minutes; OMNITRANSFER_ALL_PROCESSES=2 runs it, two at a time"
)
def test_all_as_processes(place):
    before = contents(place)

    def ended(request: Request) -> tuple[float, str, int]:
        end = as_process(request, place)
        lines, name = len(end.stderr.splitlines()), f"{request.module} {request.what}"
        print(f"{end.seconds:5.1f} s of computing, exit code {end.code}, {lines} lines  {name}", flush=True)
        check(request, end.code, end.stderr)
        return end.seconds, name, lines

    with ThreadPoolExecutor(int(os.environ["OMNITRANSFER_ALL_PROCESSES"])) as pool:
        found = list(pool.map(ended, REQUESTS))
    seconds, slowest, _ = max(found)
    print(f"{len(found)} processes; slowest {seconds:.1f} s ({slowest}); at most {max(lines for *_, lines in found)} lines on stderr")
    assert seconds < SECONDS
    assert contents(place) == before
