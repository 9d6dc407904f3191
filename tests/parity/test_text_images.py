"""Text similarity and aesthetic score on a tiny random CLIP of transformers, against its own logits and LAION's formula."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from configs.errors import RequestError
from evaluation import given_files
from evaluation.metrics import text_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP with random weights and a vocabulary of letters, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "eos_token_id": len(vocabulary) - 1,
            "bos_token_id": len(vocabulary) - 2, "pad_token_id": len(vocabulary) - 1}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def frames(count=3, height=40, width=64):
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def by_hand(frame):
    """Shorter side to 32 pixels (bicubic), the middle 32 x 32, CLIP's normalisation."""
    picture = Image.fromarray(frame).resize((51, 32), Image.Resampling.BICUBIC)
    left = (51 - 32) // 2
    x = np.asarray(picture)[:, left : left + 32] / 255
    x = (x - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None]


def test_the_cosine_is_that_of_the_whole_model(folder):
    """The towers apart, against the logits of both together on pixels and tokens that are made by hand."""
    network, model = text_images.TextAndImages(str(folder)), CLIPModel.from_pretrained(folder).eval()
    found = network.images(frames()) @ network.text("a red disc")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    ids = [vocabulary["<|startoftext|>"], *(vocabulary[letter] for letter in ("a</w>", "r", "e", "d</w>", "d", "i", "s", "c</w>"))]
    tokens = torch.tensor([[*ids, vocabulary["<|endoftext|>"]]])
    for frame, value in zip(frames(), found, strict=True):
        with torch.no_grad():
            output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=by_hand(frame))
        assert value == pytest.approx(float(output.logits_per_image / model.logit_scale.detach().exp()), abs=2e-5)
    assert len(set(found.round(4))) == 3
    assert np.isfinite(network.text("dog " * 50)).all()  # longer than its context


def test_the_aesthetic_score_is_a_line(folder, tmp_path):
    random = np.random.default_rng(2)
    weight, bias = random.normal(size=(1, 8)).astype(np.float32), np.array([5.0], np.float32)
    save_file({"weight": weight, "bias": bias}, tmp_path / "laion.safetensors")
    torch.save({"weight": torch.tensor(weight), "bias": torch.tensor(bias)}, tmp_path / "laion.pth")
    vectors = text_images.TextAndImages(str(folder)).images(frames())
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    expected = np.mean([vector @ weight[0] + 5 for vector in vectors]) / 10
    for name in ("laion.safetensors", "laion.pth"):
        assert text_images.AestheticHead(str(tmp_path / name))(vectors) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(RequestError, match="for vectors of 8 numbers, those of --clip have 5"):
        text_images.AestheticHead(str(tmp_path / "laion.pth"))(vectors[:, :5])


def test_folders_that_are_none(tmp_path):
    values = dict.fromkeys(given_files.FLAGS, "")
    (tmp_path / "empty").mkdir()
    (tmp_path / "head.safetensors").write_bytes(b"none")
    found, missing = given_files.load(values | {"clip": str(tmp_path / "empty"), "aesthetic": str(tmp_path / "head.safetensors")})
    assert found == []
    assert set(missing) == {"text similarity", "aesthetic"}
    assert "no CLIP of transformers" in missing["text similarity"]
    assert "no safetensors" in missing["aesthetic"]
    assert "give that too" in given_files.load(values | {"aesthetic": "head"})[1]["aesthetic"]
