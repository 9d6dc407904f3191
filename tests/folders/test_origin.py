"""A run that goes on knows the weights it started from by their contents: moved ones are the same, others in their place are not."""

import json
import shutil
from dataclasses import replace

import grain
import numpy as np
import pytest

from configs import stage1
from configs.errors import RequestError
from configs.run import CheckpointConfig
from omnitransfer_jax.folders import model_folder, run_folder
from tests.folders.test_run_folder import State, started_from

SMOKE = stage1.get_config("smoke")


def saved(folder, *steps, seed=0, keep=9):
    """A run with these checkpoints."""
    run_folder.write_config(folder, SMOKE)
    leaf, number = np.random.default_rng(seed).standard_normal(300), np.array(0)
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    with run_folder.open_checkpoints(folder, CheckpointConfig(keep=keep)) as checkpoints:
        for step in steps:
            run_folder.save(checkpoints, step, State(number, {"a": leaf + step}, {}, {"mu": leaf}, {}, number), data)
    return folder


def imported(folder, seed=0):
    leaf = np.random.default_rng(seed).standard_normal(300)
    model_folder.save_part(folder, "dit", [("a", leaf)])
    model_folder.save_part(folder, "vae", [("a", leaf)])
    model_folder.write_model(folder, {"dit": SMOKE.dit, "vae": SMOKE.vae})
    return folder


def digest(folder, recorded=""):
    return run_folder.origin_digest(str(folder), {"dit"}, recorded)


@pytest.fixture(params=["imported", "run"])
def origin(request, tmp_path):
    return (imported if request.param == "imported" else lambda folder: saved(folder, 4))(tmp_path / "origin")


def test_moved_weights_do_not_stop_a_run(origin, tmp_path, monkeypatch):
    workdir, known = tmp_path / "run", digest(origin)
    run_folder.write_config(workdir, started_from(SMOKE, origin), "", known)
    moved = shutil.copytree(origin, tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    monkeypatch.chdir(tmp_path)
    for place in (origin, moved, "moved", "link", "run/../moved"):
        assert known
        assert digest(place, known) == known
        run_folder.require_same_run(workdir, started_from(SMOKE, place), "", digest(place, known))
    shutil.rmtree(origin)
    run_folder.require_same_run(workdir, started_from(SMOKE, moved), "", digest(moved, known))


def test_other_weights_in_their_place_do(origin, tmp_path):
    workdir, known = tmp_path / "run", digest(origin)
    run_folder.write_config(workdir, started_from(SMOKE, origin), "", known)
    is_run = run_folder.is_run(str(origin))
    shutil.rmtree(origin)
    saved(origin, 4, seed=1) if is_run else imported(origin, seed=1)
    with pytest.raises(RequestError, match=f"^{workdir}: was started with other weights than --train.init_from has now; give those, or an"):
        run_folder.require_same_run(workdir, started_from(SMOKE, origin), "", digest(origin, known))


def test_a_run_that_went_on_is_still_the_same(tmp_path):
    origin = saved(tmp_path / "origin", 2, 4)
    known = digest(origin)
    saved(origin, 6)
    assert digest(origin) != known == digest(origin, known)
    saved(origin, 8, keep=2)  # checkpoint 4 is gone: nothing to compare, so the path decides, as for runs of earlier versions
    assert digest(origin, known) == ""
    workdir = tmp_path / "run"
    run_folder.write_config(workdir, started_from(SMOKE, origin), "", known)
    run_folder.require_same_run(workdir, started_from(SMOKE, origin), "", "")
    with pytest.raises(RequestError, match=r"--train.init_from='elsewhere': the run in .* was started with '.*origin'"):
        run_folder.require_same_run(workdir, started_from(SMOKE, "elsewhere"), "", "")


def test_what_is_not_read_does_not_matter(tmp_path):
    """The autoencoder, which no part of this run starts from; the records tell whether it is the same."""
    folder = imported(tmp_path / "origin")
    known = digest(folder)
    shutil.rmtree(folder / "vae")
    model_folder.save_part(folder, "vae", [("a", np.ones(3))])
    assert digest(folder) == known
    assert run_folder.origin_digest(str(folder), {"dit", "vae"}) != known


def test_nothing_is_known_of_random_or_absent_weights(tmp_path):
    assert [digest(folder) for folder in ("", tmp_path)] == ["", ""]


def test_the_digests_are_kept_beside_the_configuration(tmp_path):
    run_folder.write_config(tmp_path, SMOKE, "data", "weights")
    assert run_folder.digests(tmp_path) == {"data_digest": "data", "origin_digest": "weights"}
    assert run_folder.read_config(tmp_path) == SMOKE
    run_folder.write_config(tmp_path, SMOKE)
    assert run_folder.digests(tmp_path) == {"data_digest": "", "origin_digest": ""}
    assert not {"data_digest", "origin_digest"} & json.loads((tmp_path / "config.json").read_text()).keys()


def test_resumed_with_another_seed_is_another_run_wherever_its_weights_are(origin, tmp_path):
    run_folder.write_config(tmp_path, started_from(SMOKE, origin), "", digest(origin))
    with pytest.raises(RequestError, match="--seed=3"):
        run_folder.require_same_run(tmp_path, replace(started_from(SMOKE, "moved"), seed=3), "", digest(origin))


def test_frozen_weights_come_from_the_run_before_while_it_is_the_same(tmp_path):
    """Its are in float32. When it has gone on, its newest weights are others than this run was trained with."""
    before, workdir, half = saved(tmp_path / "before", 4), tmp_path / "run", np.full(300, 0.5)
    number, data = np.array(0), iter(grain.MapDataset.range(9).to_iter_dataset())
    run_folder.write_config(workdir, started_from(SMOKE, before), "", digest(before))
    with run_folder.open_checkpoints(workdir, CheckpointConfig()) as checkpoints:
        run_folder.save(checkpoints, 1, State(number, {"b": half}, {"a": half}, {}, {}, number), data)
    params = {"a": half, "b": half}
    theirs = np.random.default_rng(0).standard_normal(300) + 4
    np.testing.assert_allclose(run_folder.load_params(workdir, params, dtype="float32")["a"], theirs, rtol=1e-6)
    saved(before, 6)
    found = run_folder.load_params(workdir, params, dtype="float32")
    assert (np.asarray(found["a"]) == 0.5).all()
    assert (np.asarray(found["b"]) == 0.5).all()
    run_folder.write_config(workdir, started_from(SMOKE, before))  # as earlier versions did: it is not known, and read
    np.testing.assert_allclose(run_folder.load_params(workdir, params, dtype="float32")["a"], theirs + 2, rtol=1e-6)
