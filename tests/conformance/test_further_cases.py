"""Cases from public reports beyond the matrix: equal to plain transformers with PEFT, or refused in one line.

The table of reports is in README.md beside this file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from helpers.made import write_rows
from helpers.tokenizers_made import bert_style, eos_style, qwen_style, smollm_style
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loracurve.curve.files import load_adapter
from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import generate
from loracurve.inference.prediction import predict_split
from loracurve.model.base_model import load_base, open_base
from loracurve.model.config import ModelConfig
from loracurve.model.curve_model import CurveModel
from loracurve.runs.lm_eval import Scorer
from loracurve.system.errors import UserError
from loracurve.system.files import read_json, write_json
from loracurve.tasks.batching import collate
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.encoding import Encoded, Example

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT = {
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
GEMMA3 = {
    "text_config": GEMMA,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 3,
    "boi_token_index": 4,
    "eoi_token_index": 5,
}
IDS = torch.tensor([[3, 9, 4, 11, 7, 6]])
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)
PREFIX = "base_model.model."
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
HEAD = {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}


def spread(model: nn.Module) -> nn.Module:
    """Weights that make log-probabilities differ, no bias zero and no norm one."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.data = p.data.mul(3) if p.dim() > 1 else p.data + 0.1 * torch.randn_like(p)
    return model.eval()


def made(architecture: str, config: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return spread(getattr(tf, architecture)(getattr(tf, config)(**options)))


BASES: dict[str, Callable[[], nn.Module]] = {
    "qwen2": lambda: made("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "twelve layers": lambda: made("Qwen2ForCausalLM", "Qwen2Config", **GROUPED | {"num_hidden_layers": 12}),
    "tied": lambda: made("Qwen2ForCausalLM", "Qwen2Config", tie_word_embeddings=True, **GROUPED),
    "bodies": lambda: made("Qwen2Model", "Qwen2Config", **GROUPED),
    "classifier": lambda: made("Qwen2ForSequenceClassification", "Qwen2Config", num_labels=3, **GROUPED),
    "reward": lambda: made("Qwen2ForSequenceClassification", "Qwen2Config", num_labels=1, **GROUPED),
    "biases": lambda: made("LlamaForCausalLM", "LlamaConfig", attention_bias=True, mlp_bias=True, **GROUPED),
    "gpt2": lambda: made("GPT2LMHeadModel", "GPT2Config", **GPT),
    "gptj": lambda: made("GPTJForCausalLM", "GPTJConfig", rotary_dim=4, **GPT),
    "phi": lambda: made("PhiForCausalLM", "PhiConfig", **SIZES),
    "gemma2": lambda: made("Gemma2ForCausalLM", "Gemma2Config", final_logit_softcapping=2.0, **GEMMA),
    "gemma3": lambda: made("Gemma3ForConditionalGeneration", "Gemma3Config", **GEMMA3),
    "cohere": lambda: made("CohereForCausalLM", "CohereConfig", logit_scale=0.25, **GROUPED),
    "granite": lambda: made("GraniteForCausalLM", "GraniteConfig", logits_scaling=3.0, **GROUPED),
}


def rename(change: Callable[[str], str]) -> Callable[[Path], None]:
    """An edit of an adapter folder: other names of its tensors."""
    return lambda folder: tensors(folder, lambda old: {change(name): tensor for name, tensor in old.items()})


def tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({n: t.contiguous() for n, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def settings(**values: Any) -> Callable[[Path], None]:
    """An edit of adapter_config.json; ... takes an entry out."""

    def edit(folder: Path) -> None:
        config = read_json(folder / "adapter_config.json") | values
        write_json(folder / "adapter_config.json", {k: v for k, v in config.items() if v is not ...})

    return edit


@dataclass(frozen=True)
class Saved:
    """Adapters as PEFT saves them with `options`, edited as other programs or versions would have written them."""

    options: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Path], None] = lambda folder: None
    base: str = "qwen2"
    trained: str = ""
    """the base it was trained on, where it is another"""
    refused: str = ""
    """part of the message"""


NAMES = "expected names that PEFT reads"
NEWER = settings(eva_config=None, corda_config=None, a_later_option=None, peft_version="9.0.0")
OLDER = settings(
    enable_lora=None,
    merge_weights=False,
    **dict.fromkeys(
        ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "peft_version"), ...
    ),
)
BY_HAND = settings(use_rslora=None, rank_pattern={}, init_lora_weights=None, fan_in_fan_out=None)
LANGUAGE = {"target_modules": r".*language_model.*(q_proj|v_proj)"}
PATTERNS = {
    "rank_pattern": {"^q_proj": 4, "^model.layers.1.self_attn.v_proj$": 3},
    "alpha_pattern": {"^q_proj": 100, "1.self_attn.v_proj": 5},
}
ALL = {"target_modules": "all-linear"}

CASES: dict[str, Saved] = {
    "compiled, name in front": Saved(edit=rename(lambda n: f"_orig_mod.{n}"), refused=NAMES),
    "compiled, name inside": Saved(edit=rename(lambda n: n.replace(".layers.", "._orig_mod.layers.")), refused=NAMES),
    "parallel": Saved(edit=rename(lambda n: f"module.{n}"), refused=NAMES),
    "sharded wrapper": Saved(
        edit=rename(lambda n: n.replace("layers.", "_fsdp_wrapped_module.layers.")), refused=NAMES
    ),
    "checkpointed wrapper": Saved(
        edit=rename(lambda n: re.sub(r"(layers\.\d)", r"\1._checkpoint_wrapped_module", n)), refused=NAMES
    ),
    "no prefix": Saved(edit=rename(lambda n: n.removeprefix(PREFIX)), refused=NAMES),
    "saved wrapper": Saved(
        HEAD, rename(lambda n: n.replace("score.", "score.modules_to_save.")), "classifier", refused=NAMES
    ),
    "name of the adapter": Saved(edit=rename(lambda n: n.replace(".weight", ".default.weight"))),
    "name of another adapter": Saved(
        edit=rename(lambda n: n.replace(".weight", ".mine.weight")), refused="lora_.*mine"
    ),
    "trained on the model without head": Saved(
        {"task_type": "FEATURE_EXTRACTION"}, trained="bodies", refused=r"layers\.\d\.self_attn"
    ),
    "trained on the classifier": Saved(HEAD, trained="classifier", refused="score.weight"),
    "newer fields": Saved(edit=NEWER),
    "older fields": Saved(edit=OLDER),
    "nulls": Saved(edit=BY_HAND),
    "no alpha": Saved(edit=settings(lora_alpha=...)),
    "rslora": Saved({"use_rslora": True, "lora_alpha": 7}),
    "anchored patterns": Saved(PATTERNS, base="twelve layers"),
    "some layers": Saved({"layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": Saved({"exclude_modules": r".*layers\.0.*"}),
    "one name as text": Saved(edit=settings(target_modules="q_proj"), refused="which fits none"),
    "empty tensors": Saved(
        edit=lambda f: tensors(f, lambda t: {n: x[:0] for n, x in t.items()}), refused="found it of shape"
    ),
    "a part of the layers": Saved(
        edit=lambda f: tensors(f, lambda t: {n: x for n, x in t.items() if ".1." not in n}), refused="found it missing"
    ),
    "half precision": Saved(edit=lambda f: tensors(f, lambda t: {n: x.bfloat16() for n, x in t.items()})),
    "bias": Saved({"bias": "lora_only"}, base="biases", refused="bias='lora_only'"),
    "bias of B": Saved({"lora_bias": True}, refused="lora_bias"),
    "some tokens": Saved({"trainable_token_indices": [4, 5]}, refused="trainable_token_indices"),
    "embeddings": Saved({"modules_to_save": ["embed_tokens", "lm_head"]}, base="tied", refused="embed_tokens"),
    "tied heads kept tied": Saved(
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, base="tied", refused="embed_tokens"
    ),
    "tied head adapted": Saved({"target_modules": ["q_proj", "lm_head"]}, base="tied"),
    "untied, to be kept tied": Saved({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
    "conv1d": Saved({"target_modules": ["c_attn", "c_proj"]}, settings(fan_in_fan_out=False), "gpt2"),
    "conv1d, head saved": Saved(
        {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True}, base="gpt2"
    ),
    "linear, said to be conv1d": Saved(edit=settings(fan_in_fan_out=True)),
    "biases everywhere": Saved(ALL, base="biases"),
    "head with bias saved": Saved({"modules_to_save": ["lm_head"]}, base="gptj"),
    "head with bias adapted": Saved({"target_modules": ["q_proj", "lm_head"]}, base="phi"),
    "soft cap behind the head": Saved({"target_modules": ["q_proj", "lm_head"]}, base="gemma2"),
    "scale behind the head": Saved({"modules_to_save": ["lm_head"]}, base="cohere"),
    "division behind the head": Saved({"target_modules": ["q_proj", "lm_head"]}, base="granite"),
    "reward": Saved(HEAD, base="reward"),
    "names before transformers 4.52": Saved(
        LANGUAGE,
        rename(lambda n: n.replace("model.language_model.layers", "language_model.model.layers")),
        "gemma3",
        refused="names before transformers 4.52",  # PEFT renames them
    ),
}


def save(base: nn.Module, folders: Sequence[Path], **options: Any) -> None:
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**LORA | options))
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.data.add_(0.3 * torch.randn_like(p))
        model.save_pretrained(folder)


def of_peft(base: nn.Module, folder: Path, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(input_ids=ids).logits


def one_line(error: pytest.ExceptionInfo[UserError]) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_saved_adapters(name: str, tmp_path: Path) -> None:
    case, folders = CASES[name], [tmp_path / "0", tmp_path / "1"]
    base = BASES[case.base]()
    save(BASES[case.trained or case.base](), folders, **case.options)
    for folder in folders:
        case.edit(folder)
    if case.refused:
        with pytest.raises(UserError, match=case.refused) as error:
            CurveModel.from_adapters(base, folders)
        assert one_line(error)
        return
    wanted = [of_peft(base, folder) for folder in folders]
    model = CurveModel.from_adapters(copy.deepcopy(base), folders, alignment="none")
    limit = 1e-5 * max(1.0, float(wanted[0].abs().max()))
    with torch.no_grad():
        assert (base(input_ids=IDS).logits - wanted[0]).abs().max() > 0.01, "else nothing is compared"
        for t, logits in zip(ENDS.tolist(), wanted, strict=True):
            assert (model(t, input_ids=IDS).logits - logits).abs().max() < limit
            with model.merged(t):
                assert (model(input_ids=IDS).logits - logits).abs().max() < limit
    model.export(tmp_path / "end", 1.0)
    assert (of_peft(base, tmp_path / "end") - wanted[1]).abs().max() < limit


def test_adapters_in_folders_by_name(tmp_path: Path) -> None:
    model = peft.get_peft_model(BASES["qwen2"](), peft.LoraConfig(**LORA), adapter_name="mine")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="found no adapter_config.json; give the folder PEFT saved, such as .*/mine"):
        load_adapter(tmp_path)
    assert load_adapter(tmp_path / "mine")[0].r == 2


def test_adapters_that_saved_different_modules(tmp_path: Path) -> None:
    base, folders = BASES["classifier"](), [tmp_path / "0", tmp_path / "1"]
    save(base, folders[:1], **HEAD)
    save(base, folders[1:], **HEAD | {"task_type": None})
    with pytest.raises(UserError, match="score.weight is not in both"):
        CurveModel.from_adapters(base, folders)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adalora_is_no_lora(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10)
    with pytest.raises(UserError, match="expected a LoRA adapter, found PEFT type"):
        CurveModel.from_config(BASES["qwen2"](), config)
    peft.get_peft_model(BASES["qwen2"](), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"expected a LoRA adapter, found PEFT type .*ADALORA"):
        load_adapter(tmp_path)


def test_the_first_pattern_holds_after_saving(tmp_path: Path) -> None:
    """PEFT takes the first pattern that fits, and writes them in the order of the alphabet."""
    base = BASES["qwen2"]()
    patterns = {"self_attn.q_proj": 3, "q_proj": 9, "layers.1.self_attn.v_proj": 2, "v_proj": 30}
    model = CurveModel.from_config(copy.deepcopy(base), peft.LoraConfig(**LORA, alpha_pattern=patterns))
    for p in model.factors:
        p.data.add_(0.3 * torch.randn_like(p))
    with torch.no_grad():
        wanted = model.eval()(0.5, input_ids=IDS).logits
        model.save_pretrained(tmp_path / "curve")
        model.export(tmp_path / "adapter", 0.5)
        again = CurveModel.from_pretrained(tmp_path / "curve", copy.deepcopy(base)).eval()
        assert torch.equal(again(0.5, input_ids=IDS).logits, wanted)
    assert (of_peft(base, tmp_path / "adapter") - wanted).abs().max() < 1e-5


def test_dropout_is_off_on_a_base_in_evaluation_mode(tmp_path: Path) -> None:
    base, folders = BASES["qwen2"](), [tmp_path / "0", tmp_path / "1"]
    save(base, folders, lora_dropout=0.5)
    model = CurveModel.from_adapters(copy.deepcopy(base), folders, alignment="none")
    with torch.no_grad():
        assert (model(0.0, input_ids=IDS).logits - of_peft(base, folders[0])).abs().max() < 1e-5
    model.train()
    with torch.no_grad():
        assert (model(0.0, input_ids=IDS).logits - of_peft(base, folders[0])).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["peft", "compiled", "parallel", "adapter folder"])
def test_bases_that_are_wrapped_or_adapted(kind: str, tmp_path: Path) -> None:
    base: Any = BASES["qwen2"]()
    if kind == "compiled":
        base = torch.compile(base, backend="eager")
    elif kind == "parallel":
        base = nn.DataParallel(base)
    else:
        base.save_pretrained(tmp_path / "base")
        base.name_or_path = str(tmp_path / "base")
        save(base, [tmp_path / "adapter"])
        if kind == "peft":
            base = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        else:
            base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="expected a base model") as error:
        CurveModel.from_config(base, peft.LoraConfig(**LORA))
    assert one_line(error)


def test_a_head_that_is_no_longer_tied(tmp_path: Path) -> None:
    """Merging unties weights that the config still says are tied."""
    base: Any = BASES["qwen2"]()
    base.config.tie_word_embeddings = True
    base.save_pretrained(tmp_path)
    qwen_style().save_pretrained(tmp_path)
    loaded, _ = load_base(str(tmp_path))
    model = CurveModel.from_config(loaded, peft.LoraConfig(**LORA)).eval()
    with torch.no_grad():
        assert torch.equal(model(0.5, input_ids=IDS).logits, base(input_ids=IDS).logits)


class RewardModel(tf.Qwen2ForSequenceClassification):
    """A classifier whose class has a name of its own."""


def test_a_classifier_by_another_name() -> None:
    torch.manual_seed(0)
    base = spread(RewardModel(tf.Qwen2Config(**GROUPED, num_labels=3)))
    model = CurveModel.from_config(copy.deepcopy(base), peft.LoraConfig(**HEAD))
    found = predict_split(model, split([(5, 6, 7), (8, 9)], "head"), ENDS).point_log_probs
    assert found is not None
    with torch.no_grad():
        for row, ids in zip(found[0], [(5, 6, 7), (8, 9)], strict=True):
            assert (row - base(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", ["Qwen2ForTokenClassification", "Qwen2ForQuestionAnswering", "Qwen2Model"])
def test_heads_that_predict_no_tokens(architecture: str) -> None:
    model = CurveModel.from_config(made(architecture, "Qwen2Config", **GROUPED), peft.LoraConfig(**LORA))
    with pytest.raises(UserError, match="which predicts no tokens") as error:
        predict_split(model, split([(5, 6, 7)], "answer"), ENDS)
    assert one_line(error)


def split(rows: Sequence[tuple[int, ...]], scoring: Any, choices: Any = (), types: Any = None) -> Encoded:
    """Rows of three classes, which tokens 7, 8 and 9 answer."""
    examples = [Example(str(i), ids, choices, 0, 3, types) for i, ids in enumerate(rows)]
    return Encoded(examples, scoring, (7, 8, 9) if scoring == "answer" else None, ("x", "y", "z"), "sum", 0)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_a_config_with_several_ends_of_a_text(kind: str) -> None:
    options = {**GROUPED, "eos_token_id": [2, 3], "num_labels": 3}
    rows = [(5, 6, 7), (8, 3)]
    architecture = "Qwen2ForCausalLM" if kind == "causal" else "Qwen2ForSequenceClassification"
    base = made(architecture, "Qwen2Config", **options)
    model = CurveModel.from_config(copy.deepcopy(base), peft.LoraConfig(**(LORA if kind == "causal" else HEAD)))
    found = predict_split(model, split(rows, "answer" if kind == "causal" else "head"), ENDS).point_log_probs
    assert found is not None
    for row, ids in zip(found[0], rows, strict=True):
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([ids])).logits[0]
        wanted = logits[-1, [7, 8, 9]] if kind == "causal" else logits
        assert (row - wanted.log_softmax(-1)).abs().max() < 1e-5


def test_a_padding_token_that_is_none() -> None:
    """Llama's first configs have -1."""
    base = made("Qwen2ForSequenceClassification", "Qwen2Config", **GROUPED | {"pad_token_id": -1})
    model = CurveModel.from_config(base, peft.LoraConfig(**HEAD))
    with pytest.raises(UserError, match="expected a padding token in its config"):
        predict_split(model, split([(5, 6, 7)], "head"), ENDS)


def test_padding_that_is_the_end_of_a_text() -> None:
    """A classifier's row that ends in, holds, or is only the token that it pads with."""
    tokenizer: Any = copy.deepcopy(eos_style())
    tokenizer.pad_token = tokenizer.eos_token
    options = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.eos_token_id, "num_labels": 3}
    base = made("Qwen2ForSequenceClassification", "Qwen2Config", **GROUPED | options)
    rows = [tuple(tokenizer(text).input_ids) for text in ("the film is good", "bad", "a story </s> about", "</s>")]
    model = CurveModel.from_config(copy.deepcopy(base), peft.LoraConfig(**HEAD))
    found = predict_split(model, split(rows, "head"), ENDS).point_log_probs
    assert found is not None
    with torch.no_grad():
        for row, ids in zip(found[0], rows, strict=True):
            assert (row - base(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)).abs().max() < 1e-5


def test_padding_that_is_the_end_of_a_text_is_learnt() -> None:
    """The end-of-sequence token counts as a target where padding is the same token."""
    examples = [Example("a", (5, 6), ((7, 8, 2),), None, 1), Example("b", (5, 6, 9, 9), ((7, 2),), None, 1)]
    batch = collate(Encoded(examples, "lm", None, (), "sum", 0, pad_id=2), [0, 1])
    assert batch.labels.tolist() == [7, 8, 2, 7, 2]


def test_tokens_beyond_the_vocabulary() -> None:
    """Outputs are padded beyond the tokenizer's last token; such a token is written as nothing."""
    tokenizer = qwen_style()
    base: Any = made("Qwen2ForCausalLM", "Qwen2Config", **GROUPED | {"vocab_size": len(tokenizer) + 8})
    base.lm_head.weight.data[: len(tokenizer)] *= 0.01
    found = generate(
        CurveModel.from_config(base, peft.LoraConfig(**LORA)), tokenizer, "the film", GenerateConfig(max_new_tokens=3)
    )
    assert min(found[0].token_ids) >= len(tokenizer) and found[0].text == ""


def test_the_harness_begins_texts_with_bos() -> None:
    tokenizer = smollm_style()
    base = made("Qwen2ForCausalLM", "Qwen2Config", **GROUPED | {"vocab_size": len(tokenizer)})
    model = CurveModel.from_config(copy.deepcopy(base), peft.LoraConfig(**LORA)).eval()
    ids = tokenizer("good film", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0, :-1]
    wanted = float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())
    scorer = Scorer(model, tokenizer, ENDS[:1], torch.ones(1), 64)
    assert scorer.continuations([("", "good film")])[0][0] == pytest.approx(wanted, abs=1e-4)
    assert scorer.texts(["good film"])[0] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("known", [1, 2])
def test_token_types_that_the_model_lacks(known: int) -> None:
    tokenizer = bert_style()
    options = {"vocab_size": len(tokenizer), "pad_token_id": 0, "num_labels": 3, "type_vocab_size": known}
    base = made("RobertaForSequenceClassification", "RobertaConfig", **SIZES | options)
    model = CurveModel.from_config(copy.deepcopy(base), peft.LoraConfig(**HEAD | {"target_modules": ["query"]}))
    pair = tokenizer("good film", "bad film")
    rows = split([tuple(pair.input_ids)], "head", types=tuple(pair.token_type_ids))
    if known == 1:
        with pytest.raises(UserError, match="expected token types below 1"):
            predict_split(model, rows, ENDS)
        return
    found = predict_split(model, rows, ENDS).point_log_probs
    inputs = {name: torch.tensor([pair[name]]) for name in ("input_ids", "token_type_ids")}
    with torch.no_grad():
        assert found is not None and (found[0] - base(**inputs).logits.log_softmax(-1)).abs().max() < 1e-5


def long_rope(kind: str, original: int = 8, **options: Any) -> nn.Module:
    if kind == "longrope":
        rope = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 8.0, 16.0]}
        own = {"original_max_position_embeddings": original}
        rope |= {"rope_type": "longrope", "rope_theta": 1e4, **own}
        return made("Phi3ForCausalLM", "Phi3Config", **GROUPED | own | options, rope_parameters=rope)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    own = {"max_position_embeddings": original}
    return made("LlamaForCausalLM", "LlamaConfig", **GROUPED | own | options, rope_parameters=rope)


@pytest.mark.parametrize("scoring", ["answer", "text"])
@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        ("longrope", (3, 5, 4)),
        ("longrope", (20, 9, 12)),
        ("longrope", (5, 20, 6)),
        ("longrope", (7, 6)),
        ("dynamic", (3, 5, 4)),
        ("dynamic", (3, 20, 12)),
    ],
)
def test_positions_scaled_by_the_longest_row(kind: str, lengths: tuple[int, ...], scoring: str) -> None:
    """Short and long texts apart are equal to each row alone; together, or choices of one row, they are refused."""
    torch.manual_seed(3)
    rows = [tuple(torch.randint(10, 50, (n,)).tolist()) for n in lengths]
    choices = ((7, 8, 9), (9, 7), (12,)) if scoring == "text" else ()
    model = CurveModel.from_config(long_rope(kind), peft.LoraConfig(**LORA | {"target_modules": "all-linear"}))
    encoded = split(rows, scoring, choices)
    if min(lengths) <= 8 < encoded.longest_path:
        with pytest.raises(UserError, match="scales positions by the longest text"):
            predict_split(model, encoded, ENDS)
        return
    found = predict_split(model, encoded, ENDS).point_log_probs
    assert found is not None
    for row, ids in zip(found[0], rows, strict=True):
        if scoring == "answer":
            wanted = alone(kind, ids)[-1, [7, 8, 9]]
        else:
            wanted = torch.stack(
                [
                    alone(kind, (*ids, *choice[:-1]))[len(ids) - 1 :]
                    .log_softmax(-1)
                    .gather(-1, torch.tensor(choice)[:, None])
                    .sum()
                    for choice in choices
                ]
            )
        assert (row - wanted.log_softmax(-1)).abs().max() < 2e-5


def alone(kind: str, ids: Sequence[int], **options: Any) -> Tensor:
    """Logits of one row by a fresh model, which remembers no longer row."""
    with torch.no_grad():
        return long_rope(kind, **options)(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


@pytest.mark.parametrize(
    ("prompts", "new"),
    [
        (("the film", "the sun is"), 6),
        pytest.param(("the film",), 31),
        pytest.param(("the film", "the sun is a star plants need light to grow " * 3), 4),
    ],
)
def test_generated_texts_that_outgrow_a_scale(prompts: tuple[str, ...], new: int) -> None:
    tokenizer = qwen_style()
    options = {"original": 30, "vocab_size": len(tokenizer)}
    model = CurveModel.from_config(
        long_rope("longrope", **options), peft.LoraConfig(**LORA | {"target_modules": "all-linear"})
    )
    if new != 6:
        with pytest.raises(UserError, match="scales positions by the longest text"):
            generate(model, tokenizer, prompts, GenerateConfig(max_new_tokens=new))
        return
    for prompt, found in zip(
        prompts, generate(model, tokenizer, prompts, GenerateConfig(max_new_tokens=new)), strict=True
    ):
        ids = [*tokenizer(prompt).input_ids]
        for token, log_prob in zip(found.token_ids, found.log_probs, strict=True):
            assert alone("longrope", ids, **options)[-1].log_softmax(-1)[token] == pytest.approx(log_prob, abs=1e-5)
            ids.append(token)


def test_a_head_with_the_classes_in_another_order(tmp_path: Path) -> None:
    options = {"vocab_size": len(qwen_style()), "num_labels": 2}
    base: Any = made("Qwen2ForSequenceClassification", "Qwen2Config", **GROUPED | options)
    qwen_style().save_pretrained(tmp_path / "base")
    data = write_rows(tmp_path / "data", {"train": 4, "validation": 4, "test": 4})  # negative, positive
    config = ModelConfig(name=str(tmp_path / "base")), TaskConfig(data=str(data), scoring="head")
    for names in (("NEGATIVE", "POSITIVE"), ("LABEL_0", "LABEL_1"), ("POSITIVE", "NEGATIVE")):
        base.config.id2label = dict(enumerate(names))
        base.config.label2id = {name: i for i, name in enumerate(names)}
        base.save_pretrained(tmp_path / "base")
        if names[0] != "POSITIVE":
            open_base(*config)
            continue
        with pytest.raises(UserError, match="in the data's order") as error:
            open_base(*config)
        assert one_line(error)


def test_a_four_bit_base_prepared_for_training(tmp_path: Path) -> None:
    """`prepare_model_for_kbit_training` leaves embeddings, norms and the head in float32, and packed maps."""
    pytest.importorskip("bitsandbytes")
    made("Qwen2ForCausalLM", "Qwen2Config", **GROUPED | {"hidden_size": 64, "intermediate_size": 64}).save_pretrained(
        tmp_path / "base"
    )
    four = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def prepared() -> Any:
        model = tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.bfloat16, quantization_config=four, device_map={"": "cpu"}
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # else this library multiplies in bfloat16
        return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False).eval()

    folders = [tmp_path / "0", tmp_path / "1"]
    save(prepared(), folders)
    model = CurveModel.from_adapters(prepared(), folders, alignment="none").eval()
    with torch.no_grad():
        for t, folder in zip(ENDS.tolist(), folders, strict=True):
            wanted = peft.PeftModel.from_pretrained(prepared(), folder).eval()(input_ids=IDS).logits
            assert (model(t, input_ids=IDS).logits - wanted).abs().max() < 2e-5
