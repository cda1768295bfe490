"""Architectures of transformers as tiny random models, and what is known of each: equal to PEFT, refused, or wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from conformance.cases import Case

WINDOW = 20
"""sliding and local windows, in tokens"""
POSITIONS = 96
"""longest input where positions are learnt or declared"""

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_MLA = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_HEAD = {"head_dim": 16}
_GEMMA = {**_GROUPED, **_HEAD, "query_pre_attn_scalar": 16}


@dataclass(frozen=True)
class Family:
    """An architecture. Keys of `refused` and `wrong` are axis values of a case, several with blanks between them, that
    all have to hold ("" holds always); values are a part of the refusal's message, or what is wrong."""

    name: str
    kind: str
    """causal or classifier"""
    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    """class in transformers where the automatic one is another"""
    targets: Any = "all-linear"
    saved: str | None = None
    """a module for `modules_to_save`; None: the head"""
    without: Set[str] = frozenset()
    """axis values that transformers, PEFT or bitsandbytes do not have for it"""
    unbounded: bool = False
    """whether its configuration declares no longest input"""
    encoder: bool = False
    """whether texts are read as encoders do, between special tokens, pairs with token types"""
    refused: Mapping[str, str] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)

    def config(self, vocabulary: int, labels: int = 2) -> Any:
        """Raises ValueError where the installed transformers does not know the model type."""
        options = {k: v for k, v in {**_SIZES, **self.options}.items() if v is not ...}
        if "text_config" in options:
            options["text_config"] = {**options["text_config"], "vocab_size": vocabulary}
        config = AutoConfig.for_model(self.model_type, vocab_size=vocabulary, **options)
        if self.kind == "classifier":
            config.num_labels = labels
        return config

    def build(self, vocabulary: int) -> nn.Module:
        """Random weights from one seed, of a size that lets log-probabilities differ by whole nats."""
        config = self.config(vocabulary)
        torch.manual_seed(0)
        if self.architecture is not None:
            model: nn.Module = getattr(transformers, self.architecture)(config)
        elif self.kind == "causal":
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = transformers.AutoModelForSequenceClassification.from_config(config)
        spread(model)
        return model.float().eval()


def spread(model: nn.Module) -> None:
    """Make weights as large as layers of real models, so that nothing is nearly linear, and no bias or norm plain."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and 0 < float(parameter.std()) < 0.06:
                parameter.mul_(1 / math.sqrt(parameter.shape[-1]) / float(parameter.std()))
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


_FIELDS = ("architecture", "targets", "saved", "without", "unbounded", "refused", "wrong")


def _family(kind: str, encoder: bool, name: str, model_type: str | None, options: dict[str, Any]) -> Family:
    special = {k: options.pop(k) for k in _FIELDS if k in options}
    return Family(name, kind, model_type or name, options, encoder=encoder, **special)


def _causal(name: str, model_type: str | None = None, **options: Any) -> Family:
    return _family("causal", False, name, model_type, options)


def _encoder(name: str, model_type: str | None = None, **options: Any) -> Family:
    return _family("classifier", True, name, model_type, options)


def _decoder(name: str, model_type: str | None = None, **options: Any) -> Family:
    return _family("classifier", False, name, model_type, options)


_ATTENTION = {"targets": ["q_proj", "v_proj"]}
"""for mixtures of experts, where "all-linear" makes PEFT adapt tensors that are no layers"""
_SLIDING = {"sliding_window": WINDOW}
_LAYERS3 = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_NONE: dict[str, Any] = dict.fromkeys(_SIZES, ...)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Families with names of their own for sizes; the automatic mapping of names does not take them in configurations.
_GPT2 = {**_NONE, **_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
_ROTARY = {**_GPT2, "rotary_dim": 8}
_BLOOM = {**_NONE, **_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}
_MPT = {**_NONE, **_TOKENS, "d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 1, "max_seq_len": POSITIONS}
_GPT_NEO = {
    **_NONE,
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "window_size": WINDOW,
    "max_position_embeddings": POSITIONS,
}
_OPT = {"ffn_dim": 64, "word_embed_proj_dim": 64}
_FALCON = {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}
_GEMMA3 = {
    **_NONE,
    "architecture": "Gemma3ForConditionalGeneration",
    "targets": r".*language_model.*(q_proj|v_proj)",
    "text_config": {**_SIZES, **_GEMMA, **_SLIDING, **_LAYERS3},
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 3,
    "boi_token_index": 4,
    "eoi_token_index": 4,
}
_GEMMA3N = {
    **_GROUPED,
    **_HEAD,
    **_SLIDING,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": 100,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
}
_DEEPSEEK = {
    "targets": ["q_b_proj", "kv_b_proj", "o_proj"],
    **_MLA,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NO_CACHE = "expected a model that keeps a key-value cache"
_MAMBA = {
    "state_size": 8,
    "time_step_rank": 64,
    "targets": ["in_proj", "x_proj"],
    "refused": {"generate": _NO_CACHE},
    "without": {"nf4"},  # transformers multiplies by the weight of a layer that is packed then
}
_ROBERTA = {"max_position_embeddings": POSITIONS + 2, "pad_token_id": 1, "bos_token_id": 0}
_LONGFORMER = {**_ROBERTA, "max_position_embeddings": 5 * WINDOW + 2, "attention_window": WINDOW}
_XLM = {**_NONE, "pad_token_id": 0, "emb_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": POSITIONS}
_XLNET = {**_NONE, **_TOKENS, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 64}
_T5 = {
    **_NONE,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}
_DBRX = {
    **_NONE,
    **_TOKENS,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": POSITIONS,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
}
_DISTILBERT = {
    **_NONE,
    "pad_token_id": 0,
    "dim": 64,
    "hidden_dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_FUNNEL = {**_NONE, "pad_token_id": 0, "block_sizes": [1, 1], "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 64}
_BART = {
    **_NONE,
    **_TOKENS,
    "max_position_embeddings": POSITIONS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 2,
}

CAUSAL = [
    _causal("llama", **_GROUPED),
    _causal("llama, tied", "llama", tie_word_embeddings=True, **_GROUPED),
    _causal("mistral", **_GROUPED, **_SLIDING),
    _causal("ministral", **_GROUPED, **_HEAD, **_SLIDING, **_LAYERS3),
    _causal("ministral3", **_GROUPED, **_HEAD),
    _causal("mixtral", **_ATTENTION, **_GROUPED, **_SLIDING, **_LOCAL_EXPERTS),
    _causal("mixtral, all-linear", "mixtral", **_GROUPED, **_LOCAL_EXPERTS, refused={"": "target_parameters"}),
    _causal("qwen2", **_GROUPED),
    _causal("qwen2, sliding", "qwen2", **_GROUPED, **_SLIDING, use_sliding_window=True, max_window_layers=1),
    _causal("qwen3", **_GROUPED, **_HEAD),
    _causal("qwen2_moe", **_ATTENTION, **_GROUPED, **_MOE, shared_expert_intermediate_size=64),
    _causal("qwen3_moe", **_ATTENTION, **_GROUPED, **_MOE, **_HEAD),
    _causal("qwen3_next", **_ATTENTION, **_GROUPED, **_MOE, **_HEAD, **_LINEAR, shared_expert_intermediate_size=64),
    _causal("qwen3_5_text", **_GROUPED, **_HEAD, **_LINEAR),
    _causal("gemma", **_GROUPED, **_HEAD),
    _causal("gemma2", **_GEMMA, **_SLIDING),
    _causal("gemma3_text", **_GEMMA, **_SLIDING, **_LAYERS3),
    _causal("gemma3", **_GEMMA3),
    _causal("gemma3n_text", **_GEMMA3N),
    _causal("phi"),
    _causal("phi3", **_GROUPED, **_SLIDING),
    _causal("phimoe", **_ATTENTION, **_GROUPED, **_SLIDING, **_LOCAL_EXPERTS),
    _causal("gpt2", **_GPT2),
    _causal("gpt_neo", **_GPT_NEO),
    _causal("gpt_neox"),
    _causal("gptj", **_ROTARY),
    _causal("opt", **_OPT),
    _causal("bloom", **_BLOOM, unbounded=True),
    _causal("falcon, alibi", "falcon", without={"nf4"}, alibi=True),
    _causal("falcon, rotary", "falcon", without={"nf4"}, **_FALCON),
    _causal("mpt", **_MPT),
    _causal("starcoder2", **_GROUPED, **_SLIDING),
    _causal("gpt_bigcode", **_GPT2),
    _causal("codegen", **_ROTARY),
    _causal("stablelm", **_GROUPED),
    _causal("olmo", **_GROUPED),
    _causal("olmo2", **_GROUPED),
    _causal("olmo3", **_GROUPED, **_SLIDING, num_hidden_layers=4),
    _causal("olmoe", **_ATTENTION, **_GROUPED, num_experts=4, num_experts_per_tok=2),
    _causal("granite", **_GROUPED),
    _causal("granitemoe", **_GROUPED, **_LOCAL_EXPERTS),
    _causal("cohere", **_GROUPED, logit_scale=1.0),
    _causal("cohere2", **_GROUPED, **_SLIDING, num_hidden_layers=4, logit_scale=1.0),
    _causal("smollm3", **_GROUPED),
    _causal("exaone4", **_GROUPED, **_SLIDING, num_hidden_layers=4),
    _causal("glm", **_GROUPED, **_HEAD),
    _causal("glm4", **_GROUPED, **_HEAD),
    _causal("glm4_moe", **_ATTENTION, **_GROUPED, **_MOE, **_HEAD, n_routed_experts=4, n_group=1, topk_group=1),
    _causal("nemotron", **_GROUPED),
    _causal("persimmon"),
    _causal("deepseek_v2", **_DEEPSEEK),
    _causal("deepseek_v3", **_DEEPSEEK),
    _causal("dbrx", **_DBRX),
    _causal(
        "jamba",
        **_GROUPED,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=64,
        use_mamba_kernels=False,
    ),
    _causal("mamba", **_MAMBA),
    _causal(
        "mamba2",
        targets=["in_proj"],
        refused={"generate": _NO_CACHE},
        state_size=8,
        num_heads=8,
        head_dim=16,
        n_groups=2,
        chunk_size=8,
    ),
    _causal("falcon_mamba", **_MAMBA),
    _causal("rwkv", refused={"nf4": "cannot be run", "generate": _NO_CACHE}, attention_hidden_size=64),
    _causal(
        "recurrent_gemma",
        refused={"generate": _NO_CACHE},
        **_GROUPED,
        attention_window_size=WINDOW,
        lru_width=64,
        num_hidden_layers=3,
    ),
    _causal("bamba", **_GROUPED, **_MAMBA2, num_hidden_layers=4, attn_layer_indices=[1, 3]),
    _causal(
        "zamba",
        num_key_value_heads=4,
        num_hidden_layers=4,
        mamba_d_state=8,
        use_mamba_kernels=False,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
    ),
    _causal(
        "falcon_h1",
        targets=["in_proj", "q_proj", "v_proj", "down_proj"],
        **_GROUPED,
        **_HEAD,
        **_MAMBA2,
        mamba_d_ssm=128,
    ),
    _causal(
        "granitemoehybrid",
        **_GROUPED,
        **_MAMBA2,
        **_LOCAL_EXPERTS,
        shared_intermediate_size=64,
        layer_types=["mamba", "attention"],
    ),
    _causal(
        "nemotron_h",
        without={"generate"},  # transformers' own cache is off by 2e-4 to 1e-2; above 1e-3 the library refuses it
        targets=["in_proj", "q_proj", "v_proj"],
        **_GROUPED,
        **_HEAD,
        num_hidden_layers=...,
        layer_types=["linear_attention", "full_attention"] * 2,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=8,
    ),
    _causal(
        "xglm",
        hidden_size=...,
        d_model=64,
        num_layers=2,
        attention_heads=4,
        ffn_dim=64,
    ),
    _causal("biogpt"),
    _causal("ernie4_5", **_GROUPED, **_HEAD),
    _causal("helium", **_GROUPED, **_HEAD),
    _causal("arcee", **_GROUPED),
    _causal("hunyuan_v1_dense", **_GROUPED, **_HEAD),
    _causal("minimax", targets=["qkv_proj", "q_proj", "v_proj"], **_GROUPED, **_HEAD, **_LOCAL_EXPERTS, block_size=8),
    _causal(
        "lfm2",
        **_GROUPED,
        num_hidden_layers=4,
        layer_types=["conv", "full_attention"] * 2,
        block_auto_adjust_ff_dim=False,
    ),
    _causal("seed_oss", **_GROUPED, **_HEAD),
    _causal("gpt_oss", **_GROUPED, **_HEAD, **_SLIDING, **_LOCAL_EXPERTS),
    _causal("apertus", **_GROUPED),
    _causal("doge", **_GROUPED),
    _causal(
        "dots1",
        **_ATTENTION,
        **_GROUPED,
        **_MOE,
        **_HEAD,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
    ),
    _causal("diffllama", **_GROUPED),
    _causal("modernbert-decoder", local_attention=WINDOW, global_attn_every_n_layers=3, num_hidden_layers=4),
    _causal("openai-gpt", refused={"generate": _NO_CACHE}, **_GPT2),
    _causal("ctrl", **_GPT2, dff=64),
    _causal("xlstm", refused={"generate": _NO_CACHE}, without={"grown", "bfloat16"}, num_heads=4, qk_dim_factor=1.0),
    _causal("bert, decoder", "bert", is_decoder=True),
    _causal("bert, encoder", "bert", refused={"": "look at later tokens"}),
    _causal(
        "t5",
        refused={"": "an encoder and a decoder"},
        **_T5,
        architecture="T5ForConditionalGeneration",
    ),
    _causal(
        "bart",
        refused={"": "an encoder and a decoder"},
        **_BART,
        architecture="BartForConditionalGeneration",
    ),
    _causal("xlnet", refused={"": "look at later tokens"}, **_XLNET),
]


CLASSIFIERS = [
    _encoder("bert"),
    _encoder("roberta", **_ROBERTA),
    _encoder("distilbert", **_DISTILBERT, targets=["q_lin", "v_lin", "lin1"]),
    _encoder("albert", embedding_size=64),
    _encoder("electra", embedding_size=64),
    _encoder("deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _encoder("deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
    _encoder("xlm-roberta", **_ROBERTA),
    _encoder("camembert", **_ROBERTA),
    _encoder("mpnet", **_ROBERTA),
    _encoder("modernbert", local_attention=WINDOW, global_attn_every_n_layers=2),
    _encoder("ernie"),
    _encoder("convbert", embedding_size=64, refused={"": "logits change with the padding"}),
    _encoder("funnel", **_FUNNEL),
    _encoder("xlnet", **_XLNET),
    _encoder("layoutlm", max_2d_position_embeddings=32),
    _encoder("longformer", **_LONGFORMER),
    _encoder("big_bird"),
    _encoder("nystromformer", refused={"": "logits change with the padding"}),
    _encoder("mobilebert", embedding_size=64, intra_bottleneck_size=64),
    _encoder("squeezebert", embedding_size=64),
    _encoder("roformer", embedding_size=64),
    _encoder("fnet", refused={"": "logits change with the padding"}),
    _encoder("canine", without={"grown"}, refused={"": "logits change with the padding"}, num_hash_buckets=128),
    _encoder("esm", **_ROBERTA),
    _encoder("flaubert", **_XLM),
    _encoder("xlm", **_XLM),
    _encoder("megatron-bert"),
    _encoder("rembert", input_embedding_size=64, output_embedding_size=64),
    _encoder("ibert", without={"grown"}, refused={"": "do not fit this model"}, **_ROBERTA),
    _encoder("data2vec-text", **_ROBERTA),
    _encoder("eurobert"),
    _encoder("t5", refused={"": "cannot be run as a sequence classifier"}, **_T5),
    _encoder("bart", without={"nf4"}, refused={"": "cannot be run as a sequence classifier"}, **_BART),
    _decoder("llama", **_GROUPED),
    _decoder("qwen2", **_GROUPED),
    _decoder("qwen3", **_GROUPED, **_HEAD),
    _decoder("gemma", **_GROUPED, **_HEAD),
    _decoder("gemma2", **_GEMMA, **_SLIDING),
    _decoder("gemma3_text", **_GEMMA, **_SLIDING, **_LAYERS3),
    _decoder("mistral", **_GROUPED, **_SLIDING),
    _decoder("mixtral", **_ATTENTION, **_GROUPED, **_SLIDING, **_LOCAL_EXPERTS),
    _decoder("gpt2", **_GPT2),
    _decoder("gpt_neo", **_GPT_NEO),
    _decoder("gpt_neox"),
    _decoder("gptj", **_ROTARY),
    _decoder("opt", **_OPT),
    _decoder("bloom", **_BLOOM),
    _decoder("falcon", without={"nf4"}, **_FALCON),  # bitsandbytes leaves its linear maps alone
    _decoder("mpt", **_MPT),
    _decoder("phi"),
    _decoder("phi3", **_GROUPED, **_SLIDING),
    _decoder("stablelm", **_GROUPED),
    _decoder("openai-gpt", **_GPT2),
    _decoder("starcoder2", **_GROUPED, **_SLIDING),
    _decoder(
        "jamba",
        **_GROUPED,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        expert_layer_period=2,
        mamba_d_state=8,
        mamba_dt_rank=64,
        use_mamba_kernels=False,
    ),
]
FAMILIES = {f"{family.kind}: {family.name}": family for family in CAUSAL + CLASSIFIERS}


def known(table: Mapping[str, str], case: Case) -> tuple[str, str] | None:
    """The first entry of a table whose axis values all hold for the case."""
    return next(((key, text) for key, text in table.items() if case.values.issuperset(key.split())), None)
