"""Prompt cleaning, padding and truncation, and that a checkpoint's tokenizer.json is used unchanged."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from configs.errors import RequestError
from configs.wan import get_config
from omnitransfer_jax.tokenizer import byte_tokenizer, clean_prompt, load_tokenizer, tokenize, word_tokenizer

PROMPTS = ["a cat", "été 猫", "", "a much longer prompt than fits"]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a  cat\n\truns\u3000\u00a0fast ", "a cat runs fast"),
        ("salt &amp; pepper", "salt & pepper"),
        ("<3 salt &amp;amp; pepper", "<3 salt & pepper"),  # the "<" keeps ftfy from resolving entities itself
        ("schÃ¶n", "schön"),
        ("\u201cquoted\u201d", '"quoted"'),
        ("a&nbsp;&#10;b", "a b"),
        ("", ""),
    ],
)
def test_clean_prompt(raw, clean):
    assert clean_prompt(raw) == clean


def test_bytes_padding_and_end():
    tokens, mask = tokenize(byte_tokenizer(), PROMPTS, 12)
    assert tokens.dtype == np.int32
    assert mask.dtype == bool
    for row, real, prompt in zip(tokens, mask, PROMPTS, strict=True):
        expected = [*(byte + 3 for byte in prompt.encode()[:11]), 1]
        assert row[real].tolist() == expected
        assert real.tolist() == [i < len(expected) for i in range(12)]
        assert not np.any(row[~real])


def test_every_byte_fits_the_smoke_vocabulary():
    """ASCII with its control characters, and of every other script the first character of its block."""
    text = "".join(map(chr, [*range(128), *(c for c in range(128, 0x110000, 256) if not 0xD800 <= c < 0xE000)]))
    tokenizer = byte_tokenizer()
    tokens, mask = tokenize(tokenizer, [text], 4 * len(text))
    assert tokens[mask].max() < get_config("smoke").text.vocab_size
    assert tokens[mask][:-1].tolist() == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(tokens[mask][:-1]) == text


def test_qwens_special_tokens_are_single_ids():
    names = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    mllm = get_config("smoke").mllm
    assert byte_tokenizer()("a".join(names), add_special_tokens=False)["input_ids"][::2] == [259, 260, 261, 262, 263, 264]
    assert (mllm.vision_start, mllm.image_token, mllm.video_token) == (261, 263, 264)


def test_words_are_the_tokens_of_a_word_vocabulary(tmp_path):
    """In alphabetical order after the special tokens; case, blanks and line breaks are ignored, punctuation is kept."""
    vocabulary = word_tokenizer(["The disc glides.", "user\n", "a DISC"])
    vocabulary.save_pretrained(tmp_path)
    for tokenizer in (vocabulary, load_tokenizer(tmp_path)):
        assert tokenizer.convert_ids_to_tokens(list(range(15))) == [
            "<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
            ".", "a", "disc", "glides", "the", "user",
        ]  # fmt: skip
        assert tokenizer("A  Disc\nglides.flies")["input_ids"] == [10, 11, 12, 9, 2, 1]
        assert 3 not in tokenizer("<|im_start|>", split_special_tokens=True)["input_ids"]
        tokens, mask = tokenize(tokenizer, ["the disc", "a disc glides ."], 4)
        assert tokens.tolist() == [[13, 11, 1, 0], [10, 11, 12, 1]]
        assert mask.tolist() == [[True] * 3 + [False], [True] * 4]


def test_saved_and_loaded(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    expected = tokenize(byte_tokenizer(), PROMPTS, 12)
    for folder in (tmp_path, tmp_path / "tokenizer"):
        for ours, wanted in zip(tokenize(load_tokenizer(folder), PROMPTS, 12), expected, strict=True):
            np.testing.assert_array_equal(ours, wanted)


def test_published_file_is_used_unchanged(tmp_path):
    """A small file of the published kind: Unigram with byte fallback, under a config that says T5Tokenizer."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    raw = Tokenizer(models.Unigram([*pieces, ("▁", -2.0), ("▁cat", -1.0), ("t", -3.0), ("e", -3.0)], unk_id=2, byte_fallback=True))
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    raw.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    prompts = ["cat  te", "été 猫", "\uff43\uff41\uff54", ""]  # the third is "cat" in full-width letters
    tokens, mask = tokenize(load_tokenizer(tmp_path), prompts, 16)
    assert 2 not in tokens  # nothing is unknown to a vocabulary with bytes
    assert [row[real].tolist() for row, real in zip(tokens, mask, strict=True)] == [raw.encode(p).ids for p in prompts]


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(RequestError, match=r"no tokenizer\.json.*copy the tokenizer"):
        load_tokenizer(tmp_path)
