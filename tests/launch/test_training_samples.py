"""Samples while a training goes on: the prompts file, the grid, and that they are what launch.sample makes of the same weights.

The whole way, and other trainings: python -m pytest -n 0 -m slow tests/launch/test_training_samples.py
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import stage1, stage2
from configs.errors import RequestError
from data_pipelines import clips, example, prompts
from data_pipelines.encoders import Encoders, place_references
from launch import command, encode, sample, train
from launch.sampling import grid
from launch.sampling.training import TrainingSamples, chunks, padded
from omnitransfer_jax import samplers
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.methods import omnitransfer, transfer_lora
from omnitransfer_jax.models.flat_params import with_params
from omnitransfer_jax.models.omnitransfer import Conditions, denoise, embeds_text
from tests.train import event_files

SMALL = ["--config=stage1:smoke", "--vae.base_dim=4", "--vae.num_res_blocks=1", "--dit.num_layers=1", "--sampler.steps=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Example clips, a picture in the size of the training, and a prompts file."""
    folder = tmp_path_factory.mktemp("prompts")
    example.write_example(folder)
    Image.fromarray(example.SCENES["effect"][1](0.0)).resize((48, 32)).save(folder / "frame.png")
    write(
        folder,
        {"task": "motion", "prompt": "<i>a</i>", "reference": "motion_reference.mp4", "first_frame": "frame.png"},
        {"task": "id", "prompt": "a red disc", "reference": "id_reference.mp4", "start": 0.25},
    )
    return folder


def write(folder, *rows):
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(module, *args):
    return command.execute(module.main, module.FLAGS, [*SMALL, *args])


@pytest.mark.slow  # a minute: a run, and launch.sample after it
def test_the_grids_of_a_run_are_what_launch_sample_makes(folder, tmp_path, capsys):
    """At 0, every 3 steps, when asked, and at the end; the same noise each time; resumed, the column of before the training stays."""
    records, workdir, given = tmp_path / "records", tmp_path / "run", f"--train.sample_prompts={folder / 'prompts.jsonl'}"
    assert run(encode, f"--manifest={folder / example.MANIFEST_FILE}", f"--out={records}") == 0
    training = [f"--data.path={records}", f"--workdir={workdir}", given, "--train.sample_every=3", "--train.batch_size=2"]
    assert run(train, *training, "--train.steps=4") == 0
    assert run(train, *training, "--train.steps=7") == 0
    names = sorted(path.name for path in (workdir / "samples").iterdir())
    steps = ["step_000000", "step_000003", "step_000004", "step_000006", "step_000007"]
    assert names == sorted(["base.npz", *steps, *(f"{name}.webp" for name in steps)])
    made = workdir / "samples" / "step_000007"
    assert run(sample, f"--checkpoint={workdir}", "--task=motion", f"--reference={folder / 'motion_reference.mp4'}",
               f"--first_frame={folder / 'frame.png'}", "--prompt=<i>a</i>", f"--out={tmp_path / 'motion.mp4'}") == 0  # fmt: skip
    assert same_clips(tmp_path / "motion.mp4", made / "1_motion.mp4")
    assert not same_clips(tmp_path / "motion.mp4", workdir / "samples" / "step_000000" / "1_motion.mp4")
    base = grid.read_base(workdir / "samples")
    first = clips.read_clip(workdir / "samples" / "step_000000" / "2_id.mp4", frames=9, fps=8, height=32, width=48)
    of_motion, of_id = (np.abs(clip[:, ::3, ::3].astype(int) - first).mean() for clip in base.values())
    assert of_id < of_motion / 2, "it is the clip of before the training, but for H.264"
    assert (workdir / "report.html").read_text().count("data:image/webp;base64,") == 4
    assert images_in(workdir) == [0, 3, 4, 6, 7]
    with Image.open(made.with_name(f"{made.name}.webp")) as picture:
        assert picture.n_frames == 9
        assert picture.width > 4 * 144


def images_in(folder):
    """The steps of the image events."""
    return [step for step, value in event_files.values(folder) if value.HasField("image") and value.image.width > 0]


def same_clips(one, other):
    return one.read_bytes() == other.read_bytes()


PROMPTS = [prompts.Prompt("camera", "x"), prompts.Prompt("style", "a dog"), prompts.Prompt("effect", "y")]


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize("name", ["stage1", "stage2", "int8 adapters"])
def test_samples_are_those_of_the_networks_alone(name, folder, tmp_path):
    """Three prompts of both families equal a sampling of each one alone, without a mesh."""
    adapters = name == "int8 adapters"
    config = (stage2 if name == "stage2" else stage1).get_config("lora_smoke" if adapters else "smoke")
    if adapters:
        config = replace(config, base="int8")
    config = replace(config, sampler=replace(config.sampler, steps=2), dit=replace(config.dit, num_layers=1, dtype="float32"))
    here = [
        each._replace(reference=folder / f"{each.task}_reference.mp4", first_frame=None if each.task == "style" else folder / "frame.png")
        for each in PROMPTS
    ]
    mesh = make_mesh(config.mesh)
    objective = transfer_lora.objective(config) if adapters else omnitransfer.objective(config)
    base = transfer_lora.load_base(config, objective, mesh) if adapters else {}
    params = {path: jax.random.normal(jax.random.key(len(path)), x.shape) * 0.05 for path, x in objective.params.items()}
    samples = TrainingSamples(config, [(each, prompts.read_pictures(each, config)) for each in here], mesh, tmp_path, base)
    found = samples.sample(params)
    model = with_params(samples.model, {path: jnp.asarray(x) for path, x in {**params, **base}.items()})
    encoders = Encoders(config, "")
    for number, (prompt, latents) in enumerate(zip(here, found, strict=True)):
        expected = alone(config, encoders, model, samples, number)
        assert latents.shape == expected.shape
        np.testing.assert_allclose(latents, expected, rtol=2e-4, atol=2e-4, err_msg=prompt.task)


def alone(config, encoders, model, samples, number):
    """One prompt, without a mesh and without a compiled sampling: the sampler's own loop."""
    encoded = samples.encoded[number]
    if model.alignment is None:
        text, negative = jnp.asarray(encoded.text), jnp.asarray(encoders.text([""])[0])
    else:
        text, negative = encoders.contexts([""], model.alignment, [(encoded.task, encoded.inputs)])
    image = None if encoded.image is None else jnp.asarray(encoded.image)
    references = place_references(config, config.video, [(encoded.task, encoded.reference)])
    conditions = Conditions(text, negative, image, jnp.asarray(encoded.condition), references)
    (expert,) = samplers.experts(config.sampler)
    state = samplers.start(jnp.asarray(samples.noise(number)))
    return np.asarray(denoise(model.dit, conditions, state, config.sampler, expert, embed_text=embeds_text(config)).latents[0])


GOOD = {"task": "motion", "prompt": "", "reference": "a.mp4", "first_frame": "a.png"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task": "dance"}, 'task "dance": not one of id'),
        ({"prompt": 3}, "prompt 3: not a text"),
        ({"reference": None}, "reference: this training reads references; give one"),
        ({"first_frame": None}, "first_frame: motion starts from a picture; give one"),
        ({"task": "id"}, "first_frame: id starts from none; leave it out"),
        ({"seed": 1}, '"seed": no such key; there are task, prompt, reference'),
        ({"start": -1}, "start -1: seconds from 0 on"),
        ({"start": {"target": 1}}, "start: of the reference, in seconds; give a number"),
        ({"reference": "absent.mp4"}, "absent.mp4: no such file"),
    ],
)
def test_a_bad_prompts_file_is_one_line_before_the_training(row, message, tmp_path, capsys):
    content = {key: value for key, value in {**GOOD, **row}.items() if value is not None}
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(content) + "\n")
    assert run(train, f"--workdir={tmp_path / 'run'}", f"--data.path={tmp_path / 'records'}", f"--train.sample_prompts={path}") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_prompts_of_a_training_without_references(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\n{"task": "id", "prompt": "a"}\n')
    assert prompts.read_prompts(path, False) == [prompts.Prompt("id", "a")]
    with pytest.raises(RequestError, match=r"jsonl:2: reference: this training reads references"):
        prompts.read_prompts(path, True)
    path.write_text('{"task": "id", "prompt": "a"}\n' * 65)
    with pytest.raises(RequestError, match="65 prompts"):
        prompts.read_prompts(path, False)


def test_groups_are_of_one_family():
    assert chunks({0: True, 1: False, 2: True, 3: True}, 2) == [[0, 2], [3], [1]]
    assert padded([3], 2) == [3, 3]


def test_a_damaged_base_costs_its_column_alone(tmp_path):
    grid.write_base(tmp_path, {"a": np.zeros((1, 2, 2, 3), np.uint8)})
    assert list(grid.read_base(tmp_path)) == ["a"]
    content = (tmp_path / grid.BASE_FILE).read_bytes()
    for size in (0, 10, len(content) // 2):
        (tmp_path / grid.BASE_FILE).write_bytes(content[:size])
        assert grid.read_base(tmp_path) == {}
