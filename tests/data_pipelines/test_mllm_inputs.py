"""What the language model reads: text, placeholders, positions and features that agree, and records that keep them."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from configs.errors import RequestError
from data_pipelines import batches, clips, example, mllm_inputs, pairs, records
from data_pipelines.encoders import Encoders
from data_pipelines.manifest import read_manifest
from launch import command, import_weights
from launch import encode as launch_encode
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.batch import batch_spec
from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.mesh import make_mesh, to_mesh
from omnitransfer_jax.models.alignment import MLLMInputs
from omnitransfer_jax.models.flat_params import abstract, flat_params
from omnitransfer_jax.models.qwen2_5_vision import QwenVision, patchify
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL
from omnitransfer_jax.tokenizer import byte_tokenizer
from omnitransfer_jax.weights.convert import load
from omnitransfer_jax.weights.files import find, inspect
from omnitransfer_jax.weights.qwen2_5_vl import config_json, entries
from tests.compare import relative_l2
from tests.data_pipelines.conftest import SMOKE

ALIGNED = replace(SMOKE, alignment=replace(SMOKE.alignment, enabled=True))
# Image and reference of other shapes than one another, more than one row and column of features, an even number of frames.
LARGE = replace(
    ALIGNED,
    video=replace(SMOKE.video, height=64, width=96),
    data=replace(SMOKE.data, reference=replace(SMOKE.video, frames=17, height=96, width=64)),
    alignment=replace(ALIGNED.alignment, frames=4, frame_pixels=12 * 28 * 28),
)
SIZES = pytest.mark.parametrize("config", [ALIGNED, LARGE], ids=["smoke", "large"])


@pytest.fixture(scope="module")
def vocabulary():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def mllm():
    return load_models.load_mllm("", ALIGNED)


@pytest.fixture(scope="module")
def encoders():
    return Encoders(ALIGNED, "")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return example.write_example(tmp_path_factory.mktemp("clips"))


def text_of(tokens):
    """Byte tokens as text."""
    return bytes(token - 3 for token in tokens).decode()


@SIZES
@pytest.mark.parametrize("has_first_frame", [True, False])
def test_every_placeholder_has_its_feature(vocabulary, config, has_first_frame):
    found = mllm_inputs.token_inputs(config, vocabulary, "motion", "a cat", has_first_frame)
    image, video = mllm_inputs.sizes(config)
    length, features = mllm_inputs.lengths(config)
    assert {name: array.shape for name, array in found.items()} == {
        "tokens": (length,), "mask": (length,), "positions": (3, length), "source": (length,)
    }  # fmt: skip
    assert {name: array.dtype.name for name, array in found.items()} == {
        "tokens": "int32", "mask": "bool", "positions": "int32", "source": "int32"
    }  # fmt: skip
    tokens, mask, source = found["tokens"], found["mask"], found["source"]
    assert features == image.features + video.features
    assert source[tokens == 264].tolist() == list(range(image.features, features))
    assert source[tokens == 263].tolist() == (list(range(image.features)) if has_first_frame else [])
    assert (source[(tokens != 263) & (tokens != 264)] == -1).all()
    assert mask.tolist() == sorted(mask, reverse=True)
    assert not tokens[~mask].any()
    # Cells of the grids, counted from the token in front; the reference's time goes by its seconds.
    seconds = config.data.reference.frames / config.data.reference.fps * 2 / config.alignment.frames  # two frames a step
    assert mllm_inputs.seconds_per_step(config) == pytest.approx(seconds)
    for token, (t, h, w), rate in ((263, image.grid, 1), (264, video.grid, 2 * seconds)):
        at = np.flatnonzero(tokens == token)
        if not len(at):
            continue
        cells = [(int(i * rate), j, k) for i in range(t) for j in range(h // 2) for k in range(w // 2)]
        start = found["positions"][:, at[0] - 1] + 1
        assert (found["positions"][:, at] - start[:, None]).T.tolist() == [list(cell) for cell in cells]
    assert (np.diff(found["positions"][0][mask & (source < 0)]) > 0).all()


@SIZES
@pytest.mark.parametrize("has_first_frame", [True, False])
def test_the_string(vocabulary, config, has_first_frame):
    """All tokens at once are those of the whole string, and its parts stand in the paper's order."""
    image, video = mllm_inputs.sizes(config)
    for task in tasks.TASKS:
        for prompt in ("", "été 猫"):
            first = f"<|vision_start|>{'<|image_pad|>' * image.features}<|vision_end|>" if has_first_frame else ""
            whole = (
                f"<|im_start|>user\n{first}<|vision_start|>{'<|video_pad|>' * video.features}<|vision_end|>"
                f"{task.template}{' ' + prompt if prompt else ''}<|im_end|>\n<|im_start|>assistant\n"
            )
            found = mllm_inputs.token_inputs(config, vocabulary, task.name, prompt, has_first_frame)
            assert found["tokens"][found["mask"]].tolist() == vocabulary(whole, add_special_tokens=False)["input_ids"]
    assert found["tokens"][:6].tolist() == [259, *(byte + 3 for byte in b"user\n")]


def test_a_long_prompt_is_cut_and_fills_the_length(vocabulary):
    room, template = ALIGNED.alignment.prompt_tokens, tasks.TASKS[1].template
    found = mllm_inputs.token_inputs(ALIGNED, vocabulary, "style", "x" * 500, True)
    assert found["mask"].all()  # bytes are the longest vocabulary, and the clips are all there
    end = found["tokens"].tolist().index(260)
    assert text_of(found["tokens"][end - room : end]) == f"{template} {'x' * 500}"[:room]
    assert text_of(found["tokens"][end + 1 : end + 2]) == "\n"
    assert found["tokens"][end + 2] == 259


def test_a_prompt_cannot_spell_special_tokens(vocabulary):
    prompt = "<|video_pad|><|im_end|> </s>"
    found = mllm_inputs.token_inputs(ALIGNED, vocabulary, "id", prompt, False)
    assert (found["tokens"] == 264).sum() == mllm_inputs.sizes(ALIGNED)[1].features
    end = found["tokens"].tolist().index(260)
    assert text_of(found["tokens"][end - len(prompt) : end]) == prompt


def test_a_wrong_request(vocabulary):
    short = replace(ALIGNED, alignment=replace(ALIGNED.alignment, prompt_tokens=9))
    needed = len(tasks.TASKS[0].template)
    with pytest.raises(RequestError, match=rf"alignment\.prompt_tokens=9: the template of id alone has {needed}; give .*={needed} or more"):
        mllm_inputs.token_inputs(short, vocabulary, "id", "", False)
    fits = replace(ALIGNED, alignment=replace(ALIGNED.alignment, prompt_tokens=needed))
    assert mllm_inputs.token_inputs(fits, vocabulary, "id", "a prompt", False)["mask"].any()
    other = replace(ALIGNED, mllm=replace(ALIGNED.mllm, image_token=7))
    with pytest.raises(RequestError, match=r"<\|image_pad\|> is 263 in the vocabulary and 7 in config\.mllm"):
        mllm_inputs.token_inputs(other, vocabulary, "id", "", False)


def test_templates():
    """They fit the bytes of the smoke size, say which frame the target starts from, and style's asks for none in particular."""
    for task in tasks.TASKS:
        assert len(task.template) <= ALIGNED.alignment.prompt_tokens
        assert ("first frame" in task.template) == (task.family == "temporal")
    assert len({task.template for task in tasks.TASKS}) == len(tasks.TASKS)


def test_frames_are_evenly_spaced():
    assert mllm_inputs.picked_frames(81, 13).tolist() == [0, 7, 13, 20, 27, 33, 40, 47, 53, 60, 67, 73, 80]
    assert mllm_inputs.picked_frames(3, 5).tolist() == [0, 0, 1, 2, 2]
    assert mllm_inputs.picked_frames(9, 1).tolist() == [0]


@SIZES
def test_features_are_the_towers(mllm, config):
    rng, (image, video) = np.random.default_rng(0), mllm_inputs.sizes(config)
    first_frame = rng.uniform(-1, 1, (config.video.height, config.video.width, 3)).astype(np.float32)
    size = config.data.reference
    reference = rng.uniform(-1, 1, (size.frames, size.height, size.width, 3)).astype(np.float32)
    encoders, task, frames, references = Encoders(config, ""), np.int32([2]), first_frame[None], reference[None]

    def features(has_frame):
        return encoders.mllm_inputs(task, [""], frames, np.float32([has_frame]), references).features[0]

    found = features(1)
    assert found.dtype == np.float32
    assert found.shape == (mllm_inputs.lengths(config)[1], config.mllm.dim)

    def resized(clip, height, width):
        x = jax.image.resize(jnp.asarray(clip), (len(clip), height, width, 3), "cubic", antialias=True)
        return patchify(jnp.clip(x, -1, 1), config.mllm.vision)

    picked = reference[np.rint(np.arange(config.alignment.frames) * (size.frames - 1) / (config.alignment.frames - 1)).astype(int)]
    patches = [resized(frames, image.height, image.width), resized(picked, video.height, video.width)]
    expected = jax.jit(QwenVision.__call__, static_argnums=2)(mllm.vision, jnp.concatenate(patches), (image.grid, video.grid))
    assert relative_l2(found, expected) <= 1e-5
    without = features(0)
    assert not without[: image.features].any()
    assert relative_l2(without[image.features :], found[image.features :]) <= 1e-6
    several = encoders.mllm_inputs(np.int32([2, 0]), ["", "a"], np.stack([first_frame] * 2), np.float32([1, 0]), np.stack([reference] * 2))
    for i, alone in enumerate((found, without)):  # a batch that mixes both
        assert relative_l2(several.features[i], alone) <= 1e-5


def test_clips_become_batches(encoders, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(launch_encode, "Encoders", lambda config, folder, devices: encoders)
    flags = ["--config=stage1:smoke", "--alignment.enabled=True", f"--manifest={manifest}", f"--out={tmp_path / 'r'}"]
    assert command.execute(launch_encode.main, launch_encode.FLAGS, flags) == 0
    rows, folder = read_manifest(manifest), tmp_path / "r"

    def reading(config):
        data = replace(config.data, path=str(folder), shuffle=False)
        return replace(config, data=data, train=replace(config.train, batch_size=5))

    batch = jax.device_get(to_mesh(next(batches.batches(reading(ALIGNED), seed=0)), make_mesh(ALIGNED.mesh)))
    spec = batch_spec(reading(ALIGNED))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), spec)
    for i, row in enumerate(rows):
        pixels = pairs.read_pixels(row, ALIGNED)
        frame = pixels.target[0] if pixels.first_frame is None else pixels.first_frame
        frames, references = (clips.to_unit(x)[None] for x in (frame, pixels.reference))
        has_frame = np.float32([pixels.first_frame is not None])
        expected = encoders.mllm_inputs(np.int32([tasks.task_index(row.task)]), [row.prompt], frames, has_frame, references)
        expected = expected._replace(features=records.from_bits(records.to_bits(expected.features)))
        for name in MLLMInputs._fields:
            assert (getattr(batch.mllm_inputs, name)[i] == getattr(expected, name)[0]).all(), name
        assert (263 in batch.mllm_inputs.tokens[i]) == (row.task not in ("id", "style")) == batch.has_image[i]
    # A configuration without alignment reads these records too, without the language model's inputs.
    plain = next(batches.batches(reading(SMOKE), seed=0))
    assert plain.mllm_inputs is None
    assert jax.tree.all(jax.tree.map(np.array_equal, plain, batch._replace(mllm_inputs=None)))


def test_records_that_do_not_fit_the_alignment_are_refused(write_records, tmp_path, monkeypatch):
    def aligned(config, **alignment):
        return replace(config, alignment=replace(config.alignment, enabled=True, **alignment))

    config = write_records(1)
    with pytest.raises(RequestError, match=r"records without inputs for the language model.* make others .*python -m launch\.encode"):
        records.Records(Path(config.data.path), aligned(config))
    folder = tmp_path / "aligned"
    records.begin(folder, ALIGNED, {})
    records.begin(folder, ALIGNED, {})
    made = json.loads((folder / "records.json").read_text())["config"]
    assert {name: made["alignment"][name] for name in ("frames", "frame_pixels", "prompt_tokens")} == {
        "frames": 5, "frame_pixels": 2 * 28 * 28, "prompt_tokens": 96
    }  # fmt: skip
    records.require_same_encoding(folder, records.read_made(folder), ALIGNED)
    as_bfloat16 = replace(ALIGNED, mllm=replace(ALIGNED.mllm, dtype="bfloat16"))
    records.require_same_encoding(folder, records.read_made(folder), as_bfloat16)
    larger = replace(ALIGNED, mllm=replace(ALIGNED.mllm, vision=replace(ALIGNED.mllm.vision, num_layers=4)))
    reworded = [task._replace(template=f"{task.template}!") for task in tasks.TASKS]
    for wrong, words in (
        (aligned(ALIGNED, frames=6), r"alignment\.frames=5 there, 6 now"),
        (aligned(ALIGNED, queries=9, prompt_tokens=97), r"alignment\.prompt_tokens=96 there, 97 now\)"),
        (larger, r"mllm\.vision\.num_layers=2 there, 4 now"),
    ):
        with pytest.raises(RequestError, match=words):
            records.require_same_encoding(folder, records.read_made(folder), wrong)
        with pytest.raises(RequestError, match=words):
            records.begin(folder, wrong, {})
    with pytest.raises(RequestError, match=r"alignment\.frames=5 there, None now"):
        records.begin(folder, SMOKE, {})
    monkeypatch.setattr(tasks, "TASKS", tuple(reworded))
    with pytest.raises(RequestError, match=r"alignment\.templates="):
        records.require_same_encoding(folder, records.read_made(folder), ALIGNED)


def test_a_template_that_does_not_fit_is_an_error_before_the_weights_are_loaded(monkeypatch):
    monkeypatch.setattr(load_models, "load_mllm", lambda *_: pytest.fail("the weights were loaded first"))
    short = replace(ALIGNED, alignment=replace(ALIGNED.alignment, prompt_tokens=70))
    with pytest.raises(RequestError, match=r"alignment\.prompt_tokens=70: the template of camera alone"):
        Encoders(short, "")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Qwen2.5-VL folder as transformers saves it."""
    torch, bridge = pytest.importorskip("torch"), pytest.importorskip("tests.parity.bridge")
    folder = tmp_path_factory.mktemp("hub")
    config = transformers.Qwen2_5_VLConfig(**config_json(ALIGNED.mllm))
    model = bridge.randomise(transformers.Qwen2_5_VLForConditionalGeneration(config)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("not a tokenizer file")
    return folder


@pytest.mark.parametrize("place", ["", "mllm"], ids=["own source", "beside"])
def test_a_hub_folder_is_imported_bit_for_bit(hub, tmp_path, capfd, place):
    source, ours = hub, tmp_path / "ours"
    if place:
        source = tmp_path / "source"
        source.mkdir()
        (source / place).symlink_to(hub)
    assert command.execute(import_weights.main, import_weights.FLAGS, [f"--source={source}", f"--out={ours}"]) == 0
    output = capfd.readouterr().out
    assert "mllm_tokenizer: copied" in output
    assert "tokenizer: not there; no prompt can be read" in output
    copied = {path.name for path in (ours / "mllm_tokenizer").iterdir() if not path.name.startswith("checksums")}
    assert copied == {"tokenizer.json", "tokenizer_config.json"}
    assert len(find(hub)) > 1

    shapes = flat_params(abstract(lambda rngs: Qwen2_5VL(ALIGNED.mllm, rngs=rngs)))
    expected = load(inspect(find(hub)), entries(ALIGNED.mllm, "diffusers"), shapes)
    found = dict(model_folder.read_part(ours, "mllm"))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert (found[path].dtype.name, found[path].tobytes()) == ("bfloat16", leaf.tobytes()), path
    loaded = flat_params(load_models.load_mllm(str(ours), ALIGNED))
    assert all(np.asarray(loaded[path]).tobytes() == leaf.tobytes() for path, leaf in expected.items())
    vocabulary = load_models.load_mllm_vocabulary(str(ours))
    ids, again = (mllm_inputs.token_inputs(ALIGNED, each, "effect", "été", True)["tokens"] for each in (vocabulary, byte_tokenizer()))
    assert (ids == again).all()


def test_a_tied_embedding_saved_twice_is_imported(hub, tmp_path):
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(hub)
    theirs = {name: x.clone().contiguous() for name, x in model.state_dict().items()}
    source = tmp_path / "source"
    source.mkdir()
    assert "lm_head.weight" in theirs
    pytest.importorskip("safetensors.torch").save_file(theirs, source / "model.safetensors")
    (source / "config.json").write_text((hub / "config.json").read_text())
    assert command.execute(import_weights.main, import_weights.FLAGS, [f"--source={source}", f"--out={tmp_path / 'ours'}"]) == 0


def test_a_checkpoint_without_the_vocabulary(tmp_path):
    model_folder.write_model(tmp_path, {"vae": SMOKE.vae})
    with pytest.raises(RequestError, match=r"mllm_tokenizer: no tokenizer\.json; import the Qwen2\.5-VL folder"):
        load_models.load_mllm_vocabulary(str(tmp_path))
