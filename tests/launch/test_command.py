"""The command line: configuration and overrides, and every wrong request in one line with exit code 2."""

import subprocess
import sys
from dataclasses import replace

import pytest
from absl import flags

from configs import vae, wan
from configs.errors import RequestError
from configs.run import Config
from configs.vae import VAETraining
from launch import command

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string("out", None, "where to write", required=True, flag_values=FLAGS)
COUNT = flags.DEFINE_integer("count", 3, "how many", flag_values=FLAGS)
KIND = flags.DEFINE_enum("kind", "a", ["a", "b"], "which kind", flag_values=FLAGS)
BARE_FLAGS = flags.FlagValues()
NAME = flags.DEFINE_string("name", "nobody", "who", flag_values=BARE_FLAGS)

SMOKE = wan.VARIANTS["smoke"]
seen = []


def main(config: Config) -> None:
    seen.append((config, OUT.value, COUNT.value))
    if OUT.value == "refuse":
        raise RequestError("refused: two\nlines")
    if OUT.value == "fail":
        raise KeyError("a mistake of ours")


def bare() -> None:
    seen.append(NAME.value)


@pytest.fixture(autouse=True)
def forget():
    seen.clear()


def execute(*argv):
    return command.execute(main, FLAGS, argv)


def test_a_configuration_by_name_and_variant():
    assert execute("--config=wan:smoke", "--out=x") == 0
    assert execute("--config", "wan", "--out", "x", "--count=5") == 0
    assert seen == [(SMOKE, "x", 3), (Config(), "x", 5)]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--seed=7"], replace(SMOKE, seed=7)),
        (["--seed", "7"], replace(SMOKE, seed=7)),
        (["--sampler.shift=2.5", "--sampler.solver=euler"], replace(SMOKE, sampler=replace(SMOKE.sampler, shift=2.5, solver="euler"))),
        (["--dit.patch", "1", "4", "4"], replace(SMOKE, dit=replace(SMOKE.dit, patch=(1, 4, 4)))),
        (["--dit.patch=1", "4", "4"], replace(SMOKE, dit=replace(SMOKE.dit, patch=(1, 4, 4)))),
        (
            ["--dit.image_dim=None", "--dit.in_channels=16"],
            replace(SMOKE, dit=replace(SMOKE.dit, image_dim=None, in_channels=16)),
        ),
        (["--sampler.negative_prompt=a b --c"], replace(SMOKE, sampler=replace(SMOKE.sampler, negative_prompt="a b --c"))),
        (["--data.shuffle=False"], replace(SMOKE, data=replace(SMOKE.data, shuffle=False))),
        (["--train.trainable", "dit/a.*", "vae/b"], replace(SMOKE, train=replace(SMOKE.train, trainable=("dit/a.*", "vae/b")))),
        (["--dit.eps=1e-5", "--seed=1"], replace(SMOKE, seed=1, dit=replace(SMOKE.dit, eps=1e-5))),
    ],
)
def test_any_field_can_be_overridden(args, expected):
    assert execute("--config=wan:smoke", *args, "--out=x") == 0
    assert seen == [(expected, "x", 3)]


GIVEN = ["--config=wan:smoke", "--out=x"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out=x"], "--config (NAME[:VARIANT] of "),
        (["--config=wan"], "--out (where to write): not given, and this command needs it"),
        (["--config=wam", "--out=x"], "--config=wam: no such configuration, did you mean wan?; there are "),
        (["--config=base", "--out=x"], "--config=base: no such configuration"),
        (
            ["--config=wan:tin", "--out=x"],
            "variant 'tin': not one of i2v_2_2_14b, i2v_720p, smoke, smoke_2_2, t2v_14b, t2v_1_3b, t2v_2_2_14b, tiny",
        ),
        ([*GIVEN, "--outt=y"], "--outt: no such flag or configuration field, did you mean --out?; --help lists all"),
        ([*GIVEN, "--sampler.step=3"], "--sampler.step: no such flag or configuration field, did you mean --sampler.steps?"),
        ([*GIVEN, "--steps=3"], "--steps: no such flag or configuration field, did you mean --train.steps?"),
        ([*GIVEN, "--zzzzzz=3"], "--zzzzzz: no such flag or configuration field; --help lists all"),
        ([*GIVEN, "--sampler.steps=abc"], "--sampler.steps=abc: expected int"),
        ([*GIVEN, "--sampler.shift"], "--sampler.shift=: expected float"),
        ([*GIVEN, "--sampler.solver=eulr"], "--sampler.solver=eulr: expected one of unipc, dpm++, euler"),
        ([*GIVEN, "--dit.image_dim=wide"], "--dit.image_dim=wide: expected int | None"),
        ([*GIVEN, "--dit.patch=1,2,2"], "--dit.patch=1,2,2: expected values of (int, int, int), separated by blanks"),
        ([*GIVEN, "--data.shuffle=maybe"], "--data.shuffle=maybe: expected bool"),
        ([*GIVEN, "--vae.dim_mult=a"], "--vae.dim_mult=a: expected values of (int, ...), separated by blanks"),
        ([*GIVEN, "--seed=1", "--seed=x"], "--seed=x: expected int"),
        ([*GIVEN, "--count=many"], "--count=many"),
        ([*GIVEN, "--kind=c"], "--kind=c: value should be one of <a|b>"),
        ([*GIVEN, "word"], "word: not a flag; flags are given as --name=value"),
        ([*GIVEN, "--video.frames=18"], "video.frames=18: the causal autoencoder needs 4n+1, the nearest is 17"),
        (["--config=wan:smoke", "--out=refuse"], "refused: two lines"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(capfd, args, message):
    assert execute(*args) == 2
    output = capfd.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.err.endswith("\n")
    assert not output.out
    assert not seen or args[-1] == "--out=refuse", "the body ran although the request was wrong"


def disk_full():
    """The error of a library that writes files itself, as Orbax raises it: another one explains it."""
    inner = ValueError('RESOURCE_EXHAUSTED: Failed writing: "/disk/file": No space left on device')
    raise RuntimeError("a checkpoint was not written") from inner


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "a.mp4"), 1, "a.mp4: No space left on device; what was finished is whole: free some"),
        (disk_full, 1, "/disk/file: No space left on device; what was finished is whole"),
        (PermissionError(13, "Permission denied", "DIR"), 1, "DIR: Permission denied"),
        (OSError("two\nlines"), 1, "two lines"),
        (BrokenPipeError(), 1, "BrokenPipeError"),
        (KeyboardInterrupt(), 130, "interrupted; what was finished is whole, and the same command goes on or begins again"),
    ],
)
def test_the_system_s_errors_and_ctrl_c_are_one_line(error, code, message, capfd):
    def fail() -> None:
        if isinstance(error, BaseException):
            raise error
        error()

    assert command.execute(fail, flags.FlagValues(), []) == code
    stderr = capfd.readouterr().err
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1


def test_a_mistake_after_a_missing_file_keeps_its_traceback():
    def fail() -> None:
        try:
            open("no such file").close()
        except OSError:
            raise KeyError("a mistake of ours")  # noqa: B904 - its context is the OSError, its cause is not

    with pytest.raises(KeyError, match="a mistake of ours"):
        command.execute(fail, flags.FlagValues(), [])


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError, match="a mistake of ours"):
        execute("--config=wan:smoke", "--out=fail")


def test_a_command_without_configuration(capfd):
    assert command.execute(bare, BARE_FLAGS, ["--name=ada"]) == 0
    assert command.execute(bare, BARE_FLAGS, []) == 0
    assert seen == ["ada", "nobody"]
    assert command.execute(bare, BARE_FLAGS, ["--nam=ada"]) == 2
    assert capfd.readouterr().err == "--nam: no such flag, did you mean --name?; --help lists all\n"


def test_help_shows_flags_fields_and_what_they_mean(capfd):
    assert execute("--help") == 0
    text = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert text.startswith("The command line: configuration and overrides")
    assert "--out where to write (required)" in text
    assert "--count how many (default 3)" in text
    assert "--config NAME[:VARIANT] of" in text
    assert "--sampler.shift FLOAT" in text
    assert "Bends the time grid towards noise: 3 at 480p, 5 at 720p." in text
    assert not seen


def test_the_configuration_of_another_command_is_refused(capfd):
    assert execute("--config=vae:tiny", "--out=x") == 2
    error = capfd.readouterr().err
    assert error.startswith("--config=vae:tiny: the configuration of another command; take ")
    assert {"stage1", "wan"} < set(error.split("take ")[1].strip().split(", "))
    assert "vae" not in error.split("take ")[1]


def test_a_command_may_take_one_of_several_configurations(capfd):
    def either(config: Config | VAETraining) -> None:
        seen.append(config)

    values = flags.FlagValues()
    assert command.execute(either, values, ["--config=vae:tiny", "--kl_weight=0.5"]) == 0
    assert seen == [replace(vae.TINY, kl_weight=0.5)]
    assert command.execute(either, values, ["--help"]) == 0
    assert "--sampler.shift FLOAT" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("args", "code", "lines"),
    [(["--source=no/such/folder", "--out=x"], 2, 1), (["--help"], 0, 0)],
)
def test_the_process_ends_with_the_code(tmp_path, args, code, lines):
    process = subprocess.run(
        [sys.executable, "-m", "launch.import_weights", *args], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == code, process.stderr
    assert process.stderr.count("\n") == lines, process.stderr


def test_neither_threads_nor_exit_handlers_add_to_the_one_line():
    """As on a full disk, where Orbax logs an error of its threads and TensorBoard's thread and exit handler raise more."""
    program = """
import atexit, threading
from absl import flags, logging
from launch import command
full = OSError(28, "No space left on device")
def fail():
    raise full
def log():
    try:
        fail()
    except OSError:
        logging.exception("a thread raised")
def main() -> None:
    atexit.register(fail)
    thread = threading.Thread(target=log)
    thread.start()
    thread.join()
    print("begun")
    fail()
command.run(main, flags.FlagValues())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout) == (1, "begun\n")
    assert run.stderr == "writing: No space left on device; what was finished is whole: free some space and give the same command again\n"


@pytest.mark.parametrize("flag_values", ["flags.FlagValues()", "flags.FLAGS"])
def test_the_process_ends_with_1_and_a_traceback_for_anything_else(flag_values):
    program = f"""
from absl import flags, logging
from launch import command
FLAGS = {flag_values}
NAME = flags.DEFINE_string("name", None, "who", required=True, flag_values=FLAGS)
def main() -> None:
    logging.info("noise")
    raise KeyError(NAME.value)
command.run(main, FLAGS)
"""
    runs = [
        subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=120, check=False)
        for args in ([], ["--name=ours"])
    ]
    assert [run.returncode for run in runs] == [2, 1]
    assert runs[0].stderr == "--name (who): not given, and this command needs it\n"
    assert runs[1].stderr.startswith("Traceback")
    assert runs[1].stderr.endswith("KeyError: 'ours'\n")
