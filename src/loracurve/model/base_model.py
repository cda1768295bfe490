"""Loading base models and tokenizers from folders, the hub, or GGUF files."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from loracurve.model.config import Dtype, ModelConfig, Quantisation
from loracurve.model.declared import text_config
from loracurve.model.trials import position_limit
from loracurve.system.consent import consented
from loracurve.system.errors import UserError, one_line
from loracurve.system.folders import is_running
from loracurve.system.paths import entries, exists, flush, is_folder
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.task import sized_dataset

__all__ = [
    "DRAWN_ANEW",
    "cache_folder",
    "convert_gguf",
    "load_base",
    "load_tokenizer",
    "loaded_with",
    "model_window",
    "open_base",
]

logger = logging.getLogger("loracurve")

DRAWN_ANEW = "loracurve_drawn_anew"
"""Attribute of a loaded model with the names of the weights that its checkpoint lacks."""

_LOADED_WITH = "loracurve_loaded_with"


def load_base(
    name: str,
    classifier: bool = False,
    dtype: Dtype = "auto",
    num_labels: int | None = None,
    trust_remote_code: bool = False,
    quantise: Quantisation = "none",
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a causal language model or a sequence classifier with its tokenizer.

    Args:
        name: a folder, or a name on the hub. A folder with a single `.gguf` file is read through transformers.
        classifier: a sequence classification head instead of a language-model head.
        dtype: `auto` takes the checkpoint's own.
        num_labels: size of the classification head; a checkpoint's head of another size is drawn anew.
        trust_remote_code: allow code from the hub; off unless asked for.
        quantise: hold the linear maps' weights in 4 (nf4, doubly quantised) or 8 bits, as QLoRA does (Dettmers et al.
            2023, arXiv 2305.14314); they are multiplied in `dtype`, for `auto` in bfloat16.
        revision: branch, tag or commit on the hub.
        tokenizer: the model's, where it is loaded already.

    Returns:
        The model, in evaluation mode, and a fast tokenizer with a padding token. Names of weights that the checkpoint
        lacks, which come from torch's global generator, are in the model's attribute `DRAWN_ANEW`.

    Raises:
        UserError: nothing loadable there, weights of other shapes than the config says, bitsandbytes not installed.
    """
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    extra: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    if (gguf := _single_gguf(name)) is not None:
        extra |= _gguf_options(gguf)
    if quantise != "none":
        dtype = "bfloat16" if dtype == "auto" else dtype
        extra |= _quantised_options(quantise, getattr(torch, dtype), gguf)
        if classifier:
            config = {"revision": revision, "trust_remote_code": trust_remote_code}
            extra["quantization_config"].llm_int8_skip_modules = _outside_layers(kind, name, config)
    try:
        loaded: Any = kind.from_pretrained(
            name,
            revision=revision,
            output_loading_info=True,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            **extra,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load model {name!r}: {one_line(error, 240)}") from error
    model, report = loaded
    others = [(key, old, new) for key, old, new in report["mismatched_keys"] if new[:1] != (num_labels,)]
    if others:
        key, old, new = others[0]
        raise UserError(f"model {name!r}: expected {key} of shape {list(new)}, found {list(old)} in its checkpoint")
    replaced = [key for key, *_ in report["mismatched_keys"]]
    if replaced:
        logger.warning("%s: its head has another number of labels; a new one of %d replaces it", name, num_labels)
    setattr(model, DRAWN_ANEW, tuple(sorted({*report["missing_keys"], *replaced})))
    setattr(model, _LOADED_WITH, ModelConfig(name, revision, "auto", trust_remote_code, quantise))
    if tokenizer is None:
        tokenizer = load_tokenizer(name, trust_remote_code, revision)
    if classifier and (model.config.pad_token_id is None or model.config.pad_token_id < 0):
        # Classifiers on decoders find the last token by the padding token.
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def loaded_with(base: nn.Module, dtype: torch.dtype, name: str | None = None) -> ModelConfig:
    """The options by which a base is loaded again as it is.

    Args:
        base: from `load_base`, or loaded by transformers.
        dtype: of its weights now.
        name: where it is. None: where it was loaded from.

    Raises:
        UserError: nobody knows where it was loaded from, or how transformers was told to quantise it.
    """
    known = getattr(base, _LOADED_WITH, None)
    if known is None:
        if getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False):
            raise UserError(
                "base: expected a quantised model from loracurve.load_base(name, quantise=...), which knows how it was "
                "quantised, found one that was loaded in another way; load it so"
            )
        trusted = type(base).__module__.startswith("transformers_modules")
        known = ModelConfig(getattr(base, "name_or_path", ""), trust_remote_code=trusted)
    if name is not None:
        known = replace(known, name=name, revision=None)
    if not known.name:
        raise UserError(
            "base: expected a model that was loaded from a folder or the hub, found one without a name; save it and "
            "its tokenizer (save_pretrained), and give the folder by base"
        )
    precision: Any = str(dtype).removeprefix("torch.")
    return replace(known, name=str(known.name), dtype=precision)


def open_base(
    config: ModelConfig,
    task: TaskConfig,
    seed: int | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The base model and tokenizer for a task: where a head is scored, a sequence classifier of as many classes as the
    data have, else a causal language model.

    Args:
        seed: of weights that no checkpoint holds (a new pooler or head), which come from the global generator: the same
            at each opening. None: the generator stays as it is.
        trust_remote_code: consent to run code that comes with the model; what `config` says of it is no consent.
        tokenizer: the model's, where it is loaded already.

    Raises:
        UserError: as `load_base`, no such data, or a config that asks to run code without consent.
    """
    classifier = task.scoring == "head"
    names = sized_dataset(task).labels if classifier else ()
    labels = len(names) if classifier else None
    if seed is not None:
        torch.manual_seed(seed)
    trusted = consented(config.trust_remote_code, f"model {config.name!r}", trust_remote_code)
    options = config.dtype, labels, trusted, config.quantise, config.revision
    base, tokenizer = load_base(config.name, classifier, *options, tokenizer)
    if classifier:
        _check_classes(base, names)
    return base, tokenizer


def _check_classes(base: nn.Module, names: Sequence[str]) -> None:
    """Refuse a checkpoint whose head knows the data's classes, by their names, in another order."""
    known: Any = getattr(base.config, "id2label", None) or {}
    drawn = " ".join(getattr(base, DRAWN_ANEW, ()))
    own = [str(known[i]).casefold() for i in sorted(known)]
    data = [name.casefold() for name in names]
    if own != data and sorted(own) == sorted(data) and not re.search(r"(classifier|score|out_proj)\.", drawn):
        raise UserError(
            f"model {getattr(base, 'name_or_path', '')!r}: expected the classes of its head in the data's order "
            f"{list(names)}, found {[known[i] for i in sorted(known)]}; list meta.json's labels in the head's order"
        )


def load_tokenizer(name: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer; where it has no padding token, EOS serves (padding is masked everywhere)."""
    extra = {"gguf_file": gguf} if (gguf := _single_gguf(name)) is not None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision, **extra)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the tokenizer of {name!r}: {one_line(error, 240)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _single_gguf(name: str) -> str | None:
    folder = Path(name)
    if not is_folder(folder) or exists(folder / "config.json"):
        return None
    files = [path for path in entries(folder) if path.suffix == ".gguf"]
    return files[0].name if len(files) == 1 else None


def _gguf_options(file: str) -> dict[str, Any]:
    """Options that read a GGUF file into plain weights; later transformers would keep its packed blocks."""
    packed_by_default = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": packed_by_default(dequantize=True)} if packed_by_default else {}
    return {"gguf_file": file, **plain}


def _quantised_options(quantise: Quantisation, dtype: torch.dtype, gguf: str | None) -> dict[str, Any]:
    """Options that quantise weights while they are loaded."""
    if gguf is not None:
        raise UserError(f"model.quantise: expected none for the GGUF file {gguf}, found {quantise}; set it to none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantise: {quantise} needs the package bitsandbytes, found none; pip install 'loracurve[quant]'"
        )
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    how: Any = {"load_in_4bit": True, **four} if quantise == "nf4" else {"load_in_8bit": True}
    return {
        "quantization_config": transformers.BitsAndBytesConfig(**how),
        "device_map": {"": PartialState().device},
    }


def _outside_layers(kind: Any, name: str, options: dict[str, Any]) -> list[str]:
    """Linear maps of a classifier that lie in no numbered layer: its head, which is trained whole, and poolers, which
    are drawn where the checkpoint lacks them. Packed weights could be neither."""
    try:
        config = AutoConfig.from_pretrained(name, **options)
        with torch.device("meta"):
            empty = kind.from_config(config, trust_remote_code=options["trust_remote_code"])
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load model {name!r}: {one_line(error, 240)}") from error
    return [n for n, m in empty.named_modules() if isinstance(m, nn.Linear) and not re.search(r"\.\d+\.", n)]


def model_window(model: nn.Module) -> int | None:
    """Longest input the model takes, in tokens: what its config says, and what its position embeddings hold. None where
    nothing limits it."""
    text = text_config(model)
    said = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits = [next((n for n in said if isinstance(n, int) and n > 0), None), position_limit(model)]
    return min((n for n in limits if n is not None), default=None)


def cache_folder() -> Path:
    """The user's cache folder for converted models (`XDG_CACHE_HOME`, else `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loracurve"


def convert_gguf(source: Path, dtype: torch.dtype, target: Path) -> Path:
    """Convert a GGUF file to a safetensors folder once, because dequantising takes ten times as long as loading.

    Args:
        source: the `.gguf` file.
        dtype: dtype of the converted weights.
        target: folder to make; returned as it is if it is there already.

    Returns:
        `target`. It appears only when it is complete.
    """
    if target.is_dir():
        return target
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=dtype, **_gguf_options(source.name))
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The weights are plain now; with this entry save_pretrained would ask for a GGUF quantiser.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    for old in target.parent.glob(f".{target.name}.*"):
        number = old.suffix[1:]
        if number.isdigit() and not is_running(int(number)):  # of a process that was killed
            shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for path in [*partial.iterdir(), partial]:
        flush(path)
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # another process may have finished first
            raise
    return target
