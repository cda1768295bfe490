"""A tiny language model of random weights with its own tokenizer: suites can be tried without any download."""

from __future__ import annotations

import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from loracurve.model.config import Dtype

__all__ = ["TINY", "tiny_model"]


TINY = "tiny-random-qwen2"

_CORPUS = """Answer: Label: Text: Question: The sentiment of the word is negative positive yes no"""


def tiny_model(dtype: Dtype = "auto") -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A Qwen2 of three layers and width 32, always the same weights, and a byte-level tokenizer of about 400 tokens.

    Letters and a few words that prompts end with are single tokens, with and without a leading space.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    letters = " ".join(f"{a} {a}" for a in string.ascii_uppercase)
    tokenizer.train_from_iterator([f"{_CORPUS} {letters}"] * 10, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=512
    )
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)  # weights of the usual initial size make a model this small nearly constant
    base: nn.Module = model
    return base.to(torch.float32 if dtype == "auto" else getattr(torch, dtype)).eval(), fast
