"""Adapters that PEFT trained and saved, in all the ways it saves them: equal to PEFT, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from helpers.tokenizers_made import qwen_style
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loracurve.curve.anchored import same_base
from loracurve.curve.config import LoraOptions
from loracurve.curve.files import load_base_record, load_curve
from loracurve.model.base_model import DRAWN_ANEW, load_base
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.system.files import read_json, write_json

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER: dict[str, Any] = {"vocab_size": 50, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
IDS = torch.tensor([[3, 9, 4, 11, 7, 2]])


def decoder(tied: bool = True, classifier: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = tf.Qwen2Config(tie_word_embeddings=tied, num_labels=3, **SIZES)
    base = (tf.Qwen2ForSequenceClassification if classifier else tf.Qwen2ForCausalLM)(config)
    for p in base.parameters():
        if p.dim() > 1:
            p.data.mul_(4)
    return base.eval()


def distilbert() -> nn.Module:
    torch.manual_seed(0)
    return tf.DistilBertForSequenceClassification(tf.DistilBertConfig(num_labels=3, **ENCODER)).eval()


def saved(base: nn.Module, folders: list[Path], seed: int = 0, **options: Any) -> list[Tensor]:
    """Adapters of random factors, as PEFT saves them, and the logits of each in PEFT."""
    found = []
    for m, folder in enumerate(folders):
        torch.manual_seed(100 + seed + m)
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **options)).eval()
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.data.add_(0.3 * torch.randn_like(p))
        model.save_pretrained(folder)
        with torch.no_grad():
            found.append(model(input_ids=IDS).logits)
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "init_lora_weights": False},
        {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": r".*layers\.(?:0|1)\..*(?:(?:q_proj|v_proj)|.*?(?:gate|up)_proj.*?)"},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r".*\.0\..*q_proj": 4}, "alpha_pattern": {"v_proj": 3}},  # noqa: E501
    ],
    ids=["lm_head saved", "lm_head adapted", "init false", "init orthogonal", "long pattern", "patterns"],
)  # fmt: skip
def test_language_models_equal_peft(tied: bool, options: dict[str, Any], tmp_path: Path) -> None:
    base, folders = decoder(tied), [tmp_path / "0", tmp_path / "1"]
    wanted = saved(base, folders, task_type="CAUSAL_LM", **options)
    model = CurveModel.from_adapters(copy.deepcopy(base), folders, alignment="none")
    with torch.no_grad():
        for t, logits in zip((0.0, 1.0), wanted, strict=True):
            assert (model(t, input_ids=IDS).logits - logits).abs().max() < 2e-5
            with model.merged(t):
                assert (model(input_ids=IDS).logits - logits).abs().max() < 2e-5
    # What is exported is what PEFT then runs, and what is saved comes back.
    model.export(tmp_path / "middle", 0.5)
    model.save_pretrained(tmp_path / "curve")
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "middle").eval()
    again = CurveModel.from_pretrained(tmp_path / "curve", copy.deepcopy(base))
    with torch.no_grad():
        middle = model(0.5, input_ids=IDS).logits
        assert (plain(input_ids=IDS).logits - middle).abs().max() < 2e-5
        assert torch.equal(again(0.5, input_ids=IDS).logits, middle)


def test_the_choices_of_a_saved_output_head_are_read_out_alone(tmp_path: Path) -> None:
    base, folders = decoder(), [tmp_path / "0", tmp_path / "1"]
    saved(base, folders, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = CurveModel.from_adapters(base, folders, alignment="none")
    head: Any = base.lm_head
    x, c = torch.randn(3, 32), torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.1, 0.1, 0.8]])
    model.runner.route.kind, model.runner.route.coefficients = "rows", c
    ids = torch.tensor([4, 40])
    found = head.inner.select(x, torch.tensor([2, 0, 1]), ids)
    weights = torch.einsum("pk,koi->poi", c[[2, 0, 1]], head.inner.weight)
    wanted = torch.einsum("pi,poi->po", x, weights)[:, ids]
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_a_grown_vocabulary_comes_with_its_adapters(tied: bool, targets: list[str], tmp_path: Path) -> None:
    """PEFT stores the embeddings beside the factors then, and its own loading puts them into the base."""
    base = decoder(tied)
    base.name_or_path = str(tmp_path / "base")  # type: ignore[assignment]
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(56)
    folders = [tmp_path / "0", tmp_path / "1"]
    wanted = saved(base, folders, task_type="CAUSAL_LM", target_modules=targets)
    stored = load_file(folders[0] / "adapter_model.safetensors")
    assert any("embed_tokens" in name or "lm_head" in name for name in stored)

    fresh = decoder(tied)
    torch.manual_seed(5)  # other new rows than those that were trained with
    fresh.resize_token_embeddings(56)
    model = CurveModel.from_adapters(fresh, folders, alignment="none")
    with torch.no_grad():
        assert (model(0.0, input_ids=IDS).logits - wanted[0]).abs().max() < 2e-5
        assert (model(1.0, input_ids=IDS).logits - wanted[1]).abs().max() < 2e-5
    model.save_pretrained(tmp_path / "curve")
    other = decoder(tied)
    torch.manual_seed(6)
    other.resize_token_embeddings(56)
    again = CurveModel.from_pretrained(tmp_path / "curve", other)
    with torch.no_grad():
        assert (again(1.0, input_ids=IDS).logits - wanted[1]).abs().max() < 2e-5
    with pytest.raises(UserError, match=r"\[50, 32\], found \[56, 32\].*resize_token_embeddings"):
        CurveModel.from_adapters(decoder(tied), folders)
    with pytest.raises(UserError, match=r"\[50, 32\], found \[56, 32\]|50, 2\], found it of shape \[3, 56, 2\]"):
        CurveModel.from_pretrained(tmp_path / "curve", decoder(tied))


def test_tensors_that_nobody_uses_are_named(tmp_path: Path) -> None:
    base, folders = decoder(), [tmp_path / "0", tmp_path / "1"]
    saved(base, folders, task_type="CAUSAL_LM", target_modules=["q_proj"])
    files = [folder / "adapter_model.safetensors" for folder in folders]
    plain = [load_file(file) for file in files]

    def refusal(*tensors: dict[str, Tensor]) -> str:
        for file, own, more in zip(files, plain, tensors, strict=True):
            save_file(own | more, file)
        with pytest.raises(UserError) as error:
            CurveModel.from_adapters(decoder(), folders)
        return str(error.value)

    norm = "base_model.model.model.norm.weight"
    assert "model.norm.weight" in refusal({norm: torch.ones(32)}, {norm: torch.full((32,), 2.0)})
    odd = {"base_model.model.model.extra.weight": torch.ones(3)}
    assert "model.extra.weight is neither" in refusal(odd, odd)
    assert "lora_B.weight" in refusal(
        {}, {"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(2, 2)}
    )


def test_what_peft_trains_of_a_classifier_is_the_curve(tmp_path: Path) -> None:
    """PEFT matches the end of names: DistilBERT's pre_classifier is trained and saved beside its classifier."""
    base, folders = distilbert(), [tmp_path / "0", tmp_path / "1"]
    wanted = saved(base, folders, task_type="SEQ_CLS", target_modules=["q_lin", "v_lin"])
    model = CurveModel.from_adapters(copy.deepcopy(base), folders, alignment="none")
    assert {"classifier", "pre_classifier"} < set(model.layers)
    with torch.no_grad():
        for t, logits in zip((0.0, 1.0), wanted, strict=True):
            assert (model(t, input_ids=IDS).logits - logits).abs().max() < 1e-5
    model.export(tmp_path / "end", 1.0)
    plain = peft.PeftModel.from_pretrained(distilbert(), tmp_path / "end").eval()
    with torch.no_grad():
        assert (plain(input_ids=IDS).logits - wanted[1]).abs().max() < 1e-5


def test_a_pooler_that_no_checkpoint_has_is_kept(tmp_path: Path) -> None:
    """transformers draws BERT's pooler at every loading of a masked language model."""
    config = tf.BertConfig(
        vocab_size=len(qwen_style()), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    tf.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    qwen_style().save_pretrained(tmp_path / "base")
    base, _ = load_base(str(tmp_path / "base"), classifier=True, num_labels=3)
    assert "bert.pooler.dense.weight" in getattr(base, DRAWN_ANEW)
    lora = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = CurveModel.from_config(base, lora, segments=1, seed=3)
    for p in model.factors:
        p.data.add_(0.2 * torch.randn_like(p))
    with torch.no_grad():
        wanted = model(0.5, input_ids=IDS).logits
    model.save_pretrained(tmp_path / "curve")
    assert read_json(tmp_path / "curve" / "curve_config.json")["format"] == 2
    parts = [f"bert.{part}.{x}" for part in ("pooler.dense", "embeddings.LayerNorm") for x in ("weight", "bias")]
    assert set(load_base_record(tmp_path / "curve").weights) == {*parts}
    model.export(tmp_path / "adapter", 0.5)
    for seed in (1, 2):
        torch.manual_seed(seed)
        again = CurveModel.from_pretrained(tmp_path / "curve")  # three labels, from the head that the curve has
        torch.manual_seed(10 + seed)
        plain = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        in_peft = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        with torch.no_grad():
            assert torch.equal(again(0.5, input_ids=IDS).logits, wanted)
            assert (in_peft(input_ids=IDS).logits - wanted).abs().max() < 1e-6


def test_heads_of_other_sizes(tmp_path: Path) -> None:
    decoder(classifier=True).save_pretrained(tmp_path / "three")
    qwen_style().save_pretrained(tmp_path / "three")
    base, _ = load_base(str(tmp_path / "three"), classifier=True, num_labels=5)
    assert base.score.weight.shape == (5, 32)  # type: ignore[union-attr]
    assert getattr(base, DRAWN_ANEW) == ("score.weight",)
    same, _ = load_base(str(tmp_path / "three"), classifier=True, num_labels=3)
    assert torch.equal(same.score.weight, decoder(classifier=True).score.weight)  # type: ignore[union-attr]
    config = read_json(tmp_path / "three" / "config.json")
    write_json(tmp_path / "three" / "config.json", config | {"intermediate_size": 24})
    with pytest.raises(UserError):
        load_base(str(tmp_path / "three"), classifier=True, num_labels=5)


def test_inits_that_change_the_base_are_refused(tmp_path: Path) -> None:
    base, folders = decoder(), [tmp_path / "0", tmp_path / "1"]
    saved(base, folders, task_type="CAUSAL_LM", target_modules=["q_proj"])
    for folder in folders:
        values = read_json(folder / "adapter_config.json")
        write_json(folder / "adapter_config.json", values | {"init_lora_weights": "pissa"})
    with pytest.raises(UserError, match="changes the base's weights"):
        CurveModel.from_adapters(decoder(), folders)
    for folder in folders:
        values = read_json(folder / "adapter_config.json")
        write_json(folder / "adapter_config.json", values | {"init_lora_weights": "eva"})
    model = CurveModel.from_adapters(decoder(), folders)
    model.save_pretrained(tmp_path / "curve")
    assert load_curve(tmp_path / "curve")[0].init_lora_weights is True


def test_names_of_one_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "other" / "base").mkdir(parents=True)
    here = str(tmp_path / "base")
    assert same_base(here, f"{here}/") and same_base(here, f"{tmp_path}/./base")
    assert not same_base(here, str(tmp_path / "other" / "base")), "both are here, and differ"
    assert same_base("Qwen/Qwen2.5-0.5B", "/cache/models--Qwen--Qwen2.5-0.5B/snapshots/abc")
    assert same_base("/machine/a/qwen", "/machine/b/qwen") and same_base("", "x")
    assert not same_base("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct")


def test_experts_are_mixed_by_the_base_alone() -> None:
    experts = {"num_local_experts": 2, **SIZES}
    model = CurveModel.from_config(
        tf.MixtralForCausalLM(tf.MixtralConfig(**experts)), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    assert {name.rpartition(".")[2] for name in model.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    qwen = tf.Qwen2MoeConfig(
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, **SIZES
    )
    model = CurveModel.from_config(
        tf.Qwen2MoeForCausalLM(qwen), LoraOptions(r=2, layers_to_transform=[1]).to_peft("base", classifier=False)
    )
    assert all(".layers.1." in name for name in model.layers)
    names = {name.rpartition(".")[2] for name in model.layers}
    assert "shared_expert_gate" not in names and {"q_proj", "down_proj"} < names


def test_patterns_end() -> None:
    for pattern in (".?" * 28 + "!", "(?:.|.)" * 30 + "!", "(a|aa)+$"):
        with pytest.raises(UserError, match="LoRA targets|target_modules"):
            CurveModel.from_config(decoder(), peft.LoraConfig(r=2, target_modules=pattern))
    with pytest.raises(UserError, match="regular expression"):
        CurveModel.from_config(decoder(), peft.LoraConfig(r=2, target_modules="(q_proj"))
