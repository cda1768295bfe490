"""Small real tokenizers of each style, trained in the test: byte-level BPE without BOS, metaspace BPE with BOS,
byte-level BPE that appends EOS, WordPiece with token types."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["bert_style", "eos_style", "llama_style", "qwen_style", "smollm_style"]

_WORDS = """Question: Answer: Text: Label: Passage: The sentiment of the word is good bad film was a very plain
story about water and fire which option is right the sun is a star plants need light to grow some metals rust in damp
air one two World Sports Business not equivalent same different red green blue large small it they he she who what"""
_ANSWERS = " A B C D E F negative positive yes no World Sports Business red green blue"


def _corpus() -> list[str]:
    cued = [f"Question: which\nA. one\nB. two\nAnswer: {answer}" for answer in _ANSWERS.split()]
    cued += [f"Text: {word}\nLabel: {answer}" for word in ("good", "bad") for answer in _ANSWERS.split()]
    cued += [
        f"The sentiment of the word {word} is {end}" for word in ("fine", "dull") for end in ("negative", "positive")
    ]
    return (cued + [_WORDS]) * 20


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(
        Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"),
        behavior="isolated",
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _fast(tokenizer: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@cache
def qwen_style() -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS; pad and end of sequence are different tokens."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_end|>"])
    return _fast(tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")


@cache
def smollm_style() -> PreTrainedTokenizerFast:
    """Byte-level BPE that has a BOS token but doesn't add it."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _fast(tokenizer, pad_token="<|im_end|>", eos_token="<|im_end|>", bos_token="<|im_start|>")


@cache
def eos_style() -> PreTrainedTokenizerFast:
    """Byte-level BPE that adds BOS in front and EOS behind by default."""
    tokenizer = _byte_level(["<pad>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return _fast(tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@cache
def llama_style() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE: spaces are "▁", one in front of the text, BOS added by the post-processor."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    # Lines apart: SentencePiece never learns pieces with a line break inside.
    tokenizer.train_from_iterator([line for text in _corpus() for line in text.splitlines()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return _fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


@cache
def bert_style() -> PreTrainedTokenizerFast:
    """WordPiece with [CLS], [SEP] and token types; lower-case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _fast(
        tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
