"""What a base model and its tokenizer are, in a few numbers: written down with what is trained, compared when opened.

A name says little: folders move, and another model may lie under an old name. The configuration and some elements of
the weights themselves tell two models apart, whatever the dtype they are loaded in and whether they are quantised.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from loracurve.curve.anchored import same_place
from loracurve.curve.files import load_adapter
from loracurve.model.base_model import DRAWN_ANEW, load_base
from loracurve.model.config import ModelConfig
from loracurve.model.injection import base_parameters
from loracurve.system.errors import UserError, one_line

__all__ = [
    "base_fingerprint",
    "check_adapters",
    "check_fingerprint",
    "compare_fingerprint",
    "compare_tokenizers",
    "tokenizer_fingerprint",
]


logger = logging.getLogger("loracurve")

MOST_TENSORS, ELEMENTS = 64, 4

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}

# Of a config, what does not shape the computation: where it came from, how it is loaded, what is given back, class
# names, and tokens that tell a tokenizer's business.
_ASIDE = (PretrainedConfig().to_dict().keys() - {"model_type", "is_encoder_decoder"}) | {
    *(
        "torch_dtype",
        "attn_implementation",
        "quantization_config",
        "use_cache",
        "num_labels",
        "initializer_range",
        "auto_map",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"),
}


def base_fingerprint(model: nn.Module, brought: Collection[str] = ()) -> dict[str, Any]:
    """What `compare_fingerprint` needs to know a base model again; JSON-able, some 10 kB.

    Args:
        model: a Hugging Face model as it was loaded, or with a curve in it (which is left out).
        brought: names of weights that a curve has brought along (`CurveModel.base_weights`), which are left out.

    Returns:
        `name` and `revision` (None where transformers knows none), which are not compared; `config`, what shapes the
        computation by dotted key; `weights`: shape, dtype and `ELEMENTS` elements (None: not finite) of up to
        `MOST_TENSORS` floating-point tensors, evenly spread over all by name. Weights that no checkpoint holds
        (`DRAWN_ANEW`) and packed ones of quantised models are left out.
    """
    known, drawn = base_parameters(model), {*getattr(model, DRAWN_ANEW, ())}
    others = {id(known[name]) for name in brought}  # tied weights are one
    tensors = {n: p for n, p in known.items() if n not in drawn and id(p) not in others and _is_readable(p)}
    names = sorted(tensors)
    step = max(len(names) / MOST_TENSORS, 1.0)
    chosen = [names[int(i * step)] for i in range(min(len(names), MOST_TENSORS))]
    return {
        "name": getattr(model, "name_or_path", "") or "",
        "revision": getattr(getattr(model, "config", None), "_commit_hash", None),
        "config": _config_of(model),
        "weights": {
            name: {"shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch."), "values": _elements(p)}
            for name in chosen
            for p in [tensors[name]]
        },
    }


def compare_fingerprint(stored: Mapping[str, Any], model: nn.Module) -> str | None:
    """In what a model differs from the base of a fingerprint, in a few words that follow "another base: "; None where
    it does not.

    Compared are keys that both configs have, and all tensors of the fingerprint: to the bit once both are in the
    coarser dtype of the two (between float16 and bfloat16: to two roundings). Tensors that are packed or drawn anew in
    one of the two are passed over.

    Raises:
        UserError: something else than a fingerprint.
    """
    known_config, known_weights = check_fingerprint(stored)
    config = _config_of(model)
    for key, known in known_config.items():
        if key in config and config[key] != known:
            return f"{key} is {_short(config[key])} in its config, expected {_short(known)}"
    parameters, drawn = base_parameters(model), set(getattr(model, DRAWN_ANEW, ()))
    for name, (shape, dtype, values) in known_weights.items():
        if name in drawn:
            continue
        if (weight := parameters.get(name)) is None:
            return f"it has no tensor {name}"
        if not _is_readable(weight):
            continue
        if list(weight.shape) != shape:
            return f"{name} has shape {list(weight.shape)}, expected {shape}"
        if not _agree(values, dtype, _elements(weight), weight.dtype):
            return f"{name} has other numbers"
    return None


Weights = dict[str, tuple[list[int], torch.dtype, "list[float | None]"]]


def check_fingerprint(stored: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """The config and the weights of a fingerprint that was read from a file. Raises UserError for something else."""
    weights: Weights = {}
    try:
        for name, known in stored["weights"].items():
            values = [None if v is None else float(v) for v in known["values"]]
            if len(values) != ELEMENTS:
                raise ValueError(f"{len(values)} values")
            weights[name] = [*map(int, known["shape"])], _DTYPES[known["dtype"]], values
        return dict(stored["config"].items()), weights
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = one_line(error, 80)
        raise UserError(f"expected numbers by which a base is known again, found others ({reason})") from error


def _is_readable(tensor: Tensor) -> bool:
    return tensor.dtype in _DTYPES.values() and tensor.device.type != "meta" and tensor.numel() > 0


@torch.no_grad()
def _elements(tensor: Tensor) -> list[float | None]:
    """Elements at fixed places, which depend on the shape alone."""
    whole: Any = tensor
    if hasattr(whole, "full_tensor"):  # spread over processes
        whole = whole.full_tensor()
    count = whole.numel()
    places = torch.tensor([(2 * i + 1) * count // (2 * ELEMENTS) for i in range(ELEMENTS)], device=whole.device)
    values = whole.detach().reshape(-1)[places].double().tolist()
    return [v if math.isfinite(v) else None for v in values]


def _agree(stored: list[float | None], before: torch.dtype, found: list[float | None], now: torch.dtype) -> bool:
    """Whether two lists of elements can be of one checkpoint, held in the dtypes `before` and `now`."""
    coarser = max((before, now), key=lambda dtype: torch.finfo(dtype).eps)
    first, second = (
        torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64).to(coarser).double()
        for values in (stored, found)
    )
    tolerance = 0.0
    if {before, now} == {torch.float16, torch.bfloat16}:  # one rounded after the other, small ones to steps of 6e-8
        tolerance = 2 * torch.finfo(torch.bfloat16).eps
    return bool(torch.isclose(first, second, rtol=tolerance, atol=1e-7 if tolerance else 0.0, equal_nan=True).all())


def _config_of(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return {} if config is None else dict(_flat(config.to_dict()))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a config that shape the computation, nested ones dotted, as JSON has their values."""
    for key, value in sorted(config.items(), key=lambda item: str(item[0])):
        if key in _ASIDE or str(key).startswith("_"):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Text that tokenizers split differently: case, accents, numbers, white space, code, scripts, special signs.
_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  Café, naïve; ＦＵＬＬ width\tand\n\nnew lines 1234567890",
    "def f(x):\n    return x_1 + 3.14e-5  # don't",
    "Ünïcödé Ελλάδα Москва 東京 한국 العربية हिन्दी 🙂👍🏽",
    "Question: (A) yes (B) no\nAnswer: A",
)

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")

_TOLD = {
    "vocabulary": "its vocabulary differs",
    "merges": "its merges or scores differ",
    "special": "its special tokens differ",
    "texts": "it splits texts in another way",
}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `compare_tokenizers` needs: hashes of the vocabulary, of merges (or scores), of how texts are split, and the
    special tokens but for padding, which is masked. Chat templates are left out. JSON-able."""
    special = {name: None if (token := getattr(tokenizer, name)) is None else str(token) for name in _SPECIAL}
    return {
        "vocabulary": _hash(sorted(tokenizer.get_vocab().items())),
        "merges": _hash(_merges(tokenizer)),
        "special": special,
        "texts": _hash([tokenizer(text, verbose=False)["input_ids"] for text in _TEXTS]),
    }


def compare_tokenizers(stored: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """In what a tokenizer differs from the one of a fingerprint, in a few words; None where it does not."""
    found = tokenizer_fingerprint(tokenizer)
    return next((told for key, told in _TOLD.items() if stored.get(key) != found[key]), None)


def _merges(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    model = json.loads(backend.to_str())["model"]
    if "merges" in model:  # written as pairs or as texts, by version
        return [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return model["vocab"] if model.get("type") == "Unigram" else None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_adapters(
    folders: Sequence[str | Path], base: nn.Module, options: ModelConfig, classifier: bool, trusted: bool = False
) -> None:
    """Compare the base that existing adapters name with the one that is used.

    The same name or folder is the same base. A base that lies elsewhere on this machine is loaded and compared; where
    none does, a warning says so.

    Args:
        folders: of adapters that PEFT saved.
        base: as it was opened.
        options: it was opened with.
        classifier: whether it has a classification head.
        trusted: consent to run code that comes with the adapters' base.

    Raises:
        UserError: adapters of another base.
    """
    labels = getattr(base.config, "num_labels", None) if classifier else None
    seen = {options.name, ""}
    for folder in folders:
        name = load_adapter(folder)[0].base_model_name_or_path or ""
        if name in seen or same_place(name, options.name):
            continue
        seen.add(name)
        reason = "not on this machine"
        if (place := _place(name)) is not None:
            try:
                with torch.random.fork_rng(devices=[]):  # a new head is drawn
                    other, _ = load_base(str(place), classifier, options.dtype, labels, trusted)
            except UserError as error:
                reason = str(error)
            else:
                if difference := compare_fingerprint(base_fingerprint(base), other):
                    raise UserError(
                        f"{folder}: expected an adapter of {options.name}, found one of {name}, which is another "
                        f"base: {difference}; give the adapters' own base"
                    )
                continue
        logger.warning(
            "%s: its base %s is not compared with %s, on which it is used (%s)", folder, name, options.name, reason
        )


def _place(name: str) -> Path | None:
    """The folder of a base on this machine: itself, or in the hub's cache."""
    if os.path.isdir(name):
        return Path(name)
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None
