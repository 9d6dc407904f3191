"""Prompts to tokens: cleaning as in the original, the tokenizer of a checkpoint, and small vocabularies of bytes or words."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from configs.errors import require

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5
QWEN_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PLACES = ("", "tokenizer", "google/umt5-xxl")  # where it is in its own folder, in a diffusers checkpoint, in an original one


def clean_prompt(prompt: str) -> str:
    """Repairs broken Unicode, resolves HTML entities (twice, for text that was escaped twice), and turns a run of blanks into a space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def tokenize(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], length: int
) -> tuple[Int32[np.ndarray, "B {length}"], Bool[np.ndarray, "B {length}"]]:
    """Token ids, and a mask that is false for padding. Every prompt ends with the end token; a long one is cut to make room for it.

    Prompts are not cleaned here; `clean_prompt` does that.
    """
    batch = tokenizer(list(prompts), padding="max_length", padding_side="right", truncation=True, max_length=length, return_tensors="np")
    return batch["input_ids"].astype(np.int32), batch["attention_mask"].astype(bool)


def token_count(tokenizer: PreTrainedTokenizerFast, prompt: str) -> int:
    """The tokens of a whole prompt, its end token included."""
    return len(tokenizer(prompt, verbose=False)["input_ids"])


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder (diffusers' layout, the original's, or the tokenizer's own folder), read offline.

    tokenizer.json is used unchanged. `AutoTokenizer` of transformers 5 would take only its vocabulary and build a plain T5 tokenizer
    without byte fallback, whose tokens differ from those that Wan was trained on.
    """
    return PreTrainedTokenizerFast.from_pretrained(require_tokenizer(folder), local_files_only=True)


def require_tokenizer(folder: str | Path) -> Path:
    """Where the tokenizer of a checkpoint folder lies; a `RequestError` if it has none."""
    found = [Path(folder, place) for place in PLACES if Path(folder, place, "tokenizer.json").is_file()]
    require(
        bool(found),
        f"{folder}: no tokenizer.json in it, in tokenizer/ or in google/umt5-xxl/; copy the tokenizer folder of a Wan2.1 checkpoint there",
    )
    return found[0]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary of 265 tokens that needs no file: UTF-8 bytes from id 3, `QWEN_SPECIAL` from id 259. For models with random weights."""
    vocabulary = [PAD, EOS, UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=UNKNOWN, byte_fallback=True))
    tokenizer.add_special_tokens(list(QWEN_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A vocabulary of the words and punctuation marks in `texts`: `QWEN_SPECIAL` from id 3, then the words in alphabetical order.

    Case, blanks and line breaks are ignored; a word that is not in `texts` becomes `UNKNOWN`. For the small world of the embedded model.
    """
    split = pre_tokenizers.BertPreTokenizer()  # at blanks and around every punctuation mark
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text.lower())})
    ids = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *QWEN_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    tokenizer.add_special_tokens(list(QWEN_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)
