"""What models are found to take: windows, positions, padding, causality."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from helpers.tiny import tiny
from helpers.tokenizers_made import qwen_style
from torch import nn

from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import generate
from loracurve.inference.prediction import predict_split
from loracurve.model.base_model import model_window
from loracurve.model.curve_model import CurveModel
from loracurve.model.declared import window_of
from loracurve.model.trials import (
    check_causal,
    decodes_in_batches,
    full_precision,
    mixing_layer,
    padding_side,
    position_limit,
    takes_tree_masks,
    trial_tokens,
)
from loracurve.system.errors import UserError
from loracurve.tasks.batching import collate
from loracurve.tasks.encoding import Encoded, Example

CPU = torch.device("cpu")
WINDOW = 16
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def widened(model: nn.Module) -> nn.Module:
    """With weights large enough that what a token sees shows in its logits."""
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(5)
    return model.eval()


def windowed(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mistral":
        return widened(tf.MistralForCausalLM(tf.MistralConfig(sliding_window=WINDOW, **SIZES)))
    if kind == "phi3":
        return widened(tf.Phi3ForCausalLM(tf.Phi3Config(sliding_window=WINDOW, **SIZES)))
    if kind == "gpt_neo":
        own = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW}
        kept = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "max_position_embeddings", "pad_token_id")}
        return widened(tf.GPTNeoForCausalLM(tf.GPTNeoConfig(**kept, **own)))
    types = {"layer_types": ["sliding_attention", "full_attention"]}
    return widened(
        tf.Gemma2ForCausalLM(
            tf.Gemma2Config(sliding_window=WINDOW, head_dim=8, query_pre_attn_scalar=8, **types, **SIZES)
        )
    )


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("ignores", [False, True])
def test_packing_is_refused_to_models_without_the_mask_and_not_for_rounding(noise: float, ignores: bool) -> None:
    """In half precision a deep model differs from itself by kernels: here by noise of 5 % of a logit's deviation."""
    base = tiny("qwen2", torch.bfloat16).eval()
    draw = torch.Generator().manual_seed(0)

    def disturb(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + (noise * output.float().std() * torch.randn(output.shape, generator=draw)).to(output)

    base.lm_head.register_forward_hook(disturb)
    if ignores:
        for layer in base.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
            )
    with torch.no_grad():
        assert takes_tree_masks(base, torch.bfloat16, CPU) is not ignores


@pytest.mark.parametrize("kind", ["mistral", "phi3", "gpt_neo", "gemma2"])
def test_rows_are_packed_within_the_window_and_not_beyond(kind: str) -> None:
    base = windowed(kind)
    # GPT-Neo counts its window along the row, the others lose it behind a mask: short rows are fine for all.
    assert takes_tree_masks(base, torch.float32, CPU, path=8, row=14)
    assert not takes_tree_masks(base, torch.float32, CPU, path=2 * WINDOW, row=4 * WINDOW)
    assert takes_tree_masks(base, torch.float32, CPU, path=8, row=64) is (kind != "gpt_neo")


def test_windows_are_found_in_nested_configs_for_half_precision() -> None:
    text = tf.Gemma3TextConfig(sliding_window=WINDOW, **SIZES)
    assert window_of(tf.Gemma3Config(text_config=text.to_dict())) == WINDOW
    assert window_of(tf.Qwen2Config(sliding_window=8, use_sliding_window=False)) is None
    base = windowed("mistral").to(torch.bfloat16)
    assert not takes_tree_masks(base, torch.bfloat16, CPU, path=2 * WINDOW, row=4 * WINDOW)


@pytest.mark.parametrize("kind", ["mistral", "phi3", "gpt_neo", "gemma2"])
@pytest.mark.parametrize("words", [3, 40])
def test_texts_longer_than_a_window_score_as_the_base_scores_them(kind: str, words: int) -> None:
    base = windowed(kind)
    twin = copy.deepcopy(base)
    examples = [
        Example(str(i), (1, *(5 + (i * 7 + j * 3) % 50 for j in range(words + i))), ((7, 9, 11), (13, 15)), 0, 2)
        for i in range(4)
    ]
    encoded = Encoded(examples, "text", None, ("a", "b"), "sum", 0)
    model = CurveModel.from_config(base, peft.LoraConfig(r=2, target_modules=r".*(q_proj|qkv_proj)"))
    found = predict_split(model, encoded, torch.tensor([0.5])).log_probs

    def score(example: Example, choice: tuple[int, ...]) -> float:
        ids = [*example.prompt, *choice]
        with torch.no_grad():
            log_probs = twin(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        return sum(float(log_probs[k - 1, ids[k]]) for k in range(len(example.prompt), len(ids)))

    wanted = torch.tensor([[score(e, c) for c in e.choices] for e in examples]).log_softmax(-1)
    assert (found - wanted).abs().max() < 3e-5


def test_positions_are_counted_as_the_model_counts_them() -> None:
    roberta = tf.RobertaForSequenceClassification(tf.RobertaConfig(**BERT, max_position_embeddings=34)).eval()
    assert position_limit(roberta) == model_window(roberta) == 32
    bert = tf.BertForSequenceClassification(tf.BertConfig(**BERT, max_position_embeddings=40)).eval()
    assert position_limit(bert) == model_window(bert) == 40
    opt = tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=60, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=24, word_embed_proj_dim=16,
        )
    ).eval()  # fmt: skip
    assert position_limit(opt) == 24  # of a table of 26
    assert position_limit(tiny("qwen2")) is None
    with torch.no_grad():  # the largest input runs, the next does not
        roberta(input_ids=torch.full((1, 32), 5))
        with pytest.raises((IndexError, RuntimeError)):
            roberta(input_ids=torch.full((1, 33), 5))


def test_wrapped_configs_tell_their_window() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.config = inner, tf.Gemma3Config(text_config={"max_position_embeddings": 77})

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()  # type: ignore[operator]

    assert model_window(Wrapper(tiny("qwen2"))) == 77


def test_encoders_are_no_causal_models() -> None:
    config = tf.BertConfig(**BERT, is_decoder=False)
    with pytest.raises(UserError, match="look at later tokens"):
        check_causal(widened(tf.BertLMHeadModel(config)), torch.float32, CPU)
    check_causal(widened(tf.BertLMHeadModel(tf.BertConfig(**BERT, is_decoder=True))), torch.float32, CPU)
    t5 = tf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="an encoder and a decoder"):
        check_causal(tf.T5ForConditionalGeneration(t5).eval(), torch.float32, CPU)


def test_an_encoder_is_refused_before_it_predicts() -> None:
    base = widened(tf.BertLMHeadModel(tf.BertConfig(**BERT, is_decoder=False)))
    model = CurveModel.from_config(base, peft.LoraConfig(r=2, target_modules=["query"], task_type="CAUSAL_LM"))
    encoded = Encoded([Example("a", (5, 6, 7), (), 0, 2)], "answer", (8, 9), ("x", "y"), "sum", 0)
    with pytest.raises(UserError, match="look at later tokens"):
        predict_split(model, encoded, torch.tensor([0.5]))


def classifier(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "xlnet":
        own = {"vocab_size": 60, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16, "pad_token_id": 5}
        return widened(tf.XLNetForSequenceClassification(tf.XLNetConfig(num_labels=3, **own)))
    if kind == "roberta":
        return widened(
            tf.RobertaForSequenceClassification(
                tf.RobertaConfig(**BERT, max_position_embeddings=66, num_labels=3, pad_token_id=1)
            )
        )
    return widened(tf.Qwen2ForSequenceClassification(tf.Qwen2Config(num_labels=3, **SIZES | {"pad_token_id": 5})))


@pytest.mark.parametrize(("kind", "side"), [("xlnet", "left"), ("roberta", "right"), ("qwen2", "right")])
def test_classifiers_pool_as_for_a_row_alone(kind: str, side: str) -> None:
    """The tokenizer pads with 0; each of these configs names another token, and XLNet reads its last place."""
    base = classifier(kind)
    twin = copy.deepcopy(base)
    assert padding_side(base, torch.float32, CPU) == side
    assert padding_side(copy.deepcopy(base).to(torch.bfloat16), torch.bfloat16, CPU) == side
    rows = [tuple(6 + (3 * i + j) % 50 for j in range(2 + 5 * i)) for i in range(6)]
    encoded = Encoded(
        [Example(str(i), row, (), 0, 3) for i, row in enumerate(rows)], "head", None, ("a", "b", "c"), "sum", 0
    )
    targets = {"xlnet": ["layer_1"], "roberta": ["query"], "qwen2": ["q_proj"]}[kind]
    model = CurveModel.from_config(base, peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS"))
    found = predict_split(model, encoded, torch.tensor([0.5])).log_probs
    with torch.no_grad():
        wanted = torch.cat([twin(input_ids=torch.tensor([row])).logits for row in rows]).log_softmax(-1)
    assert (found - wanted).abs().max() < 1e-5


def mixing(kind: str) -> nn.Module:
    if kind == "xlnet":
        return classifier("xlnet")
    torch.manual_seed(0)
    own = {
        "share_att_key": True,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "max_position_embeddings": 64,
    }
    config = tf.DebertaV2Config(**BERT | {"num_hidden_layers": 2}, **own, num_labels=3, position_buckets=8)
    return widened(tf.DebertaV2ForSequenceClassification(config))


@pytest.mark.parametrize(("kind", "targets"), [("deberta", ["query_proj", "key_proj"]), ("xlnet", ["layer_1"])])
def test_rows_that_a_model_mixes_lie_at_their_points_all_the_same(kind: str, targets: list[str]) -> None:
    """DeBERTa's key map sees positions once for all rows; XLNet's layers see [T, N, d]."""
    lora = peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS")
    model = CurveModel.from_config(mixing(kind), lora, segments=1).eval()
    for p in model.factors:
        p.data.add_(0.5 * torch.randn_like(p))
    rows = [tuple(6 + (5 * i + j) % 50 for j in range(3 + i)) for i in range(4)]
    encoded = Encoded(
        [Example(str(i), r, (), 0, 3) for i, r in enumerate(rows)], "head", None, ("a", "b", "c"), "sum", 0
    )
    t = torch.tensor([0.1, 0.9], dtype=torch.float64)
    batch = collate(encoded, range(4))

    def alone(i: int, t: float) -> torch.Tensor:
        with model.merged(t):
            return model(input_ids=torch.tensor([rows[i]])).logits[0].log_softmax(-1)

    with torch.no_grad():
        wanted = torch.stack([torch.stack([alone(i, float(x)) for i in range(4)]) for x in t])
        found = model.point_log_probs(batch, t)
        assert (found - wanted).abs().max() < 1e-5
        own = torch.tensor([[0.0, 0.3, 0.6, 1.0]], dtype=torch.float64)
        each = model.runner.scores(batch, model.coefficients(own)).log_softmax(-1)[0]
        assert (each - torch.stack([alone(i, float(own[0, i])) for i in range(4)])).abs().max() < 1e-5
        with pytest.raises(UserError, match="mixes the rows"):
            model(t, input_ids=batch.input_ids)


class Rounding(nn.Module):
    """A linear layer in bfloat16 whose kernel depends on the shape: its outputs are off by a hundredth of their spread,
    single ones by far more, otherwise for other shapes. `fault` is what it does to rows in company."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.linear = fault, nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        draw = torch.Generator().manual_seed(len(x))
        noise = 0.01 * torch.randn(x.shape, generator=draw)
        noise[..., 5] = 0.2
        y = self.linear(x) * (1 + noise.to(x.dtype))
        if len(x) == 2:
            y = {"none": y, "swapped": y.flip(0), "mean": 0.5 * (y + y.flip(0))}[self.fault]
        return y


class Stacked(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.config = tf.LlamaConfig(vocab_size=60)
        self.words = nn.Embedding(60, 64)
        self.first, self.second = Rounding(fault), Rounding("none")

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return self.second(self.first(self.words(input_ids)))


@pytest.mark.parametrize(("fault", "found"), [("none", None), ("swapped", "second"), ("mean", "second")])
def test_rounding_in_half_precision_is_no_mixing_of_rows(fault: str, found: str | None) -> None:
    """Models of more than a billion weights are tried in their own dtype: a fixed bound refused Qwen2.5-7B's shapes on
    one GPU in two."""
    torch.manual_seed(0)
    model = Stacked(fault).to(torch.bfloat16).eval()
    layers = {"first": model.first, "second": model.second}
    assert mixing_layer(model, layers, False, CPU) == found
    x, own = (model.first(model.words(trial_tokens(model, n, 7, CPU))) for n in (2, 1))
    if fault == "none":
        assert (x[0] - own[0]).abs().max() > 0.05 * own.square().mean().sqrt()  # which was the bound


def test_padding_and_caches_are_judged_in_half_precision_too() -> None:
    torch.manual_seed(0)
    deep = SIZES | {"num_hidden_layers": 24}
    llama = widened(tf.LlamaForSequenceClassification(tf.LlamaConfig(**deep, num_labels=3))).to(torch.bfloat16)
    assert padding_side(llama, torch.bfloat16, CPU) == "right"
    bert = widened(tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_labels=3))).to(torch.bfloat16)
    assert padding_side(bert, torch.bfloat16, CPU) == "right"
    assert decodes_in_batches(
        widened(tf.LlamaForCausalLM(tf.LlamaConfig(**deep))).to(torch.bfloat16), torch.bfloat16, CPU
    )


def test_a_classifier_that_pads_nowhere_is_refused() -> None:
    base = tf.FNetForSequenceClassification(
        tf.FNetConfig(vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    )
    with pytest.raises(UserError, match=r"FNetForSequenceClassification"):
        padding_side(widened(base), torch.float32, CPU)
    base = classifier("qwen2")
    base.config.pad_token_id = None
    with pytest.raises(UserError, match="pad_token_id"):
        padding_side(base, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_continued_one_by_one_where_padding_is_read(dtype: torch.dtype) -> None:
    """As by recurrent layers: here a decoder that sees no mask."""
    base = widened(tiny("qwen2", dtype, vocabulary=len(qwen_style())))
    assert decodes_in_batches(base, dtype, CPU)
    base.model.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    assert not decodes_in_batches(base, dtype, CPU)
    model = CurveModel.from_config(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    texts, t = ["good", "a very good film indeed", "bad"], torch.tensor([0.3])
    together = generate(model, qwen_style(), texts, GenerateConfig(max_new_tokens=4), t)
    for text, found in zip(texts, together, strict=True):
        (alone,) = generate(model, qwen_style(), text, GenerateConfig(max_new_tokens=4), t)
        assert found.token_ids == alone.token_ids
        assert found.log_probs == pytest.approx(alone.log_probs, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_says_something_else_is_refused(dtype: torch.dtype) -> None:
    base = widened(tiny("qwen2", dtype))
    forward = base.model.forward  # type: ignore[union-attr]

    def wrong(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:  # as if the text began anew
            kwargs["position_ids"] = torch.zeros_like(kwargs["input_ids"])
        return forward(*args, past_key_values=past_key_values, **kwargs)

    base.model.forward = wrong  # type: ignore[union-attr,assignment]
    with pytest.raises(UserError, match="continues texts from its cache as without"):
        decodes_in_batches(base, dtype, CPU)
    rwkv = tf.RwkvForCausalLM(
        tf.RwkvConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    )
    with pytest.raises(UserError, match="keeps a key-value cache"):
        decodes_in_batches(rwkv.eval(), torch.float32, CPU)


def test_trials_leave_a_model_in_half_precision_as_it_is() -> None:
    base = tiny("qwen2", torch.bfloat16).eval()
    before = {n: (p.data_ptr(), p.clone()) for n, p in base.named_parameters()}
    with full_precision(base):
        assert {p.dtype for p in base.parameters()} == {torch.float32}
    for name, p in base.named_parameters():
        place, values = before[name]
        assert p.dtype == torch.bfloat16 and p.data_ptr() == place and torch.equal(p, values)
