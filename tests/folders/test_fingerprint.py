"""The digest of a part is of its values: not of paths, files or order; it is made once and kept beside the weights."""

import shutil

import ml_dtypes
import numpy as np
import pytest

from omnitransfer_jax.folders import fingerprint, model_folder

RNG = np.random.default_rng(0)
PARAMS = {
    "blocks.kernel": RNG.standard_normal((2, 6, 4)).astype(np.float32),
    "norm.scale": RNG.standard_normal(4).astype(ml_dtypes.bfloat16),
    "step": np.array([3], np.float32),
}


def changed(path, index=0):
    leaf = PARAMS[path].copy().reshape(-1)
    leaf[index] += 1
    return PARAMS | {path: leaf.reshape(PARAMS[path].shape)}


def saved(folder, leaves=PARAMS):
    model_folder.save_part(folder, "vae", leaves.items())
    return folder


def test_equal_values_have_equal_digests_wherever_and_however_they_are_stored(tmp_path):
    one = fingerprint.of_part(saved(tmp_path / "one"), "vae")
    reordered = fingerprint.of_part(saved(tmp_path / "two", dict(reversed(PARAMS.items()))), "vae")
    model_folder.save_file(tmp_path / "file", "vae", {path: np.asarray(leaf) for path, leaf in PARAMS.items()})
    (tmp_path / "one").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied", copy_function=shutil.copy)
    found = {fingerprint.of_part(tmp_path / name, "vae") for name in ("moved", "copied", "file")}
    assert {one, reordered, *found} == {one}
    assert len(one) == 32


@pytest.mark.parametrize("leaves", [changed("blocks.kernel", 47), changed("norm.scale"), PARAMS | {"step": np.array([3], np.float16)}])
def test_other_values_have_another_digest(tmp_path, leaves):
    assert fingerprint.of_part(saved(tmp_path / "one"), "vae") != fingerprint.of_part(saved(tmp_path / "two", leaves), "vae")


def test_weights_are_read_once(tmp_path, monkeypatch):
    """The digest is kept, in the folder; it is not believed of weights that have taken the place of others."""
    digest = fingerprint.of_part(saved(tmp_path / "one"), "vae")
    other = fingerprint.of_part(saved(tmp_path / "two", changed("norm.scale")), "vae")
    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "read_part", None)
        assert fingerprint.of_part(tmp_path / "one", "vae") == digest
        (tmp_path / "one").rename(tmp_path / "moved")
        assert fingerprint.of_part(tmp_path / "moved", "vae") == digest
    shutil.rmtree(tmp_path / "moved" / "vae")
    shutil.move(tmp_path / "two" / "vae", tmp_path / "moved" / "vae")
    assert fingerprint.of_part(tmp_path / "moved", "vae") == other
    (tmp_path / "moved" / "digests.json").write_text('{"vae": ')  # cut
    assert fingerprint.of_part(tmp_path / "moved", "vae") == other


def test_a_digest_made_while_writing_is_that_of_what_is_read(tmp_path, monkeypatch):
    digest = fingerprint.Digest()
    model_folder.save_part(tmp_path, "vae", map(digest.add, PARAMS.items()))
    read = fingerprint.of_part(tmp_path, "vae")
    assert digest.value() == read
    (tmp_path / "digests.json").unlink()
    fingerprint.keep(tmp_path, "vae", digest)
    monkeypatch.setattr(model_folder, "read_part", None)
    assert fingerprint.of_part(tmp_path, "vae") == read


def test_a_part_in_one_file_leaves_no_file_beside_it(tmp_path):
    """The package's own folder may be read-only."""
    model_folder.save_file(tmp_path, "vae", {path: np.asarray(leaf) for path, leaf in PARAMS.items()})
    fingerprint.of_part(tmp_path, "vae")
    assert [path.name for path in tmp_path.iterdir()] == ["vae.safetensors"]


def test_vocabularies_count_by_their_content(tmp_path):
    for name, words in (("one", "a b"), ("two", "a b"), ("three", "a c")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(words)
    one, two, three = (fingerprint.of_files(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three
