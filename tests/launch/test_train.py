"""The command: what a dry run prints, and what is refused."""

import json

import pytest

from launch import command, train


def execute(*args):
    return command.execute(train.main, train.FLAGS, args)


def test_a_dry_run_of_the_full_size(capsys):
    assert execute("--config=stage1", "--dry_run", "--mesh.data=16", "--mesh.heads=4", "--train.ema=0.99") == 0
    out = capsys.readouterr().out
    config, _, rest = out.partition("\n\n")
    assert json.loads(config)["mesh"] == {"data": 16, "heads": 4, "keys": 1, "slices": 1, "auto": False}
    rows = {line.split()[0]: line.split()[1:] for line in rest.splitlines() if line}
    assert rows["total"] == ["16,394,878,784", "0"]
    blocks = sum(int(count[0].replace(",", "")) for name, count in rows.items() if name.startswith("dit/blocks."))
    assert blocks == 16_394_878_784 - 241_340_224  # all but what stands before and after the blocks
    spread = 16_394_878_784 * 4 / 64 / 2**30
    sizes = {name: float(rows[name][0]) for name in ("parameters", "gradients", "optimizer", "average", "sum")}
    assert sizes["gradients"] == sizes["average"]
    assert 0 < sizes["gradients"] - spread < 64 * 5e-4 * spread  # vectors, below 0.05 % of the parameters, are on every device
    assert sizes["optimizer"] == pytest.approx(2 * sizes["gradients"], abs=2e-3)
    assert sizes["sum"] == pytest.approx(5 * sizes["gradients"], abs=5e-3)
    assert "FLOPs per step: 1.96e+17 (16 samples of 12.25 PFLOP" in out


def test_a_dry_run_counts_frozen_and_trainable(capsys):
    assert execute("--config=stage1:smoke", "--dry_run", "--train.trainable", "dit/head.*") == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("dit/")}
    assert rows["dit/head"][0] != "0"
    assert rows["dit/head"][1] == "0"
    assert all(rows[name][0] == "0" for name in rows if not name.startswith("dit/head"))


@pytest.mark.parametrize(
    ("config", "rows"), [("vae:tiny", ["encoder/levels", "decoder/middle"]), ("mllm:tiny", ["token_embedding", "vision/blocks.mlp"])]
)
def test_a_dry_run_of_the_world_s_trainings(config, rows, capsys):
    assert execute(f"--config={config}", "--train.init_from=embedded", "--dry_run") == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in (*rows, "total", "GiB per device", "optimizer"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.path=records"], "--workdir: not given"),
        (["--workdir={}", "--mesh.data=4"], "mesh.data=4 is 4 devices"),
        (["--workdir={}"], "data.path is empty"),
        (["--workdir={}", "--dry_run", "--train.trainable", "vae/.*"], "'vae/.*' matches no parameter"),
    ],
)
def test_refusals_are_one_line(args, message, tmp_path, capsys):
    assert execute("--config=stage1:smoke", *(arg.format(tmp_path / "run") for arg in args)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
