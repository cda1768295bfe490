"""What a model can take, found out by small trials: outputs are compared, names and configurations are not trusted.

A model that gives something else in the way that the library wants to run it than it gives for a row alone is run in
another way, or refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loracurve.model.declared import pad_token, text_config, window_of
from loracurve.system.errors import UserError, one_line
from loracurve.tasks.batching import tree_mask

__all__ = [
    "PaddingSide",
    "check_causal",
    "decodes_in_batches",
    "full_precision",
    "mixing_layer",
    "next_inputs",
    "padding_side",
    "position_limit",
    "takes_tree_masks",
    "trial_tokens",
]

PaddingSide = Literal["right", "left"]

# Half precision rounds logits to some thousandths of their spread, and more behind many layers.
_EQUAL = {torch.float64: 1e-6, torch.float32: 1e-3}
_EQUAL_IN_HALF = 0.05

_HALF = (torch.bfloat16, torch.float16)

_MOST_COPIED = 1_000_000_000

# What models raise for arguments that they do not take.
_FAILURES = (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def trial_tokens(model: nn.Module, rows: int, length: int, device: torch.device) -> Tensor:
    """[rows, length] pseudo-random tokens without the special ones of the config."""
    config, text = model.config, text_config(model)
    named = [getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep")]
    for name in ("image", "boi", "eoi", "audio", "video"):  # of models that take more than text
        named += [getattr(config, f"{name}_token_id", None), getattr(config, f"{name}_token_index", None)]
    special = {token for tokens in named for token in (tokens if isinstance(tokens, list | tuple) else [tokens])}
    words = _word_embeddings(model)
    size = int(getattr(text, "vocab_size", 256)) if words is None else words.shape[0]
    ordinary = [i for i in range(min(size, 4096)) if i not in special] or [0]
    draw = torch.Generator().manual_seed(0)
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (rows, length), generator=draw)].to(device)


def _word_embeddings(model: nn.Module) -> Tensor | None:
    find: Any = model.get_input_embeddings
    try:
        table = find()
    except NotImplementedError:  # Canine hashes characters
        return None
    return getattr(table, "weight", None)


def _equal(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    spread = wanted.double().square().mean().sqrt()
    return bool((found.double() - wanted.double()).abs().max() <= _EQUAL.get(dtype, _EQUAL_IN_HALF) * spread)


def _as_wanted(found: Tensor, wanted: Tensor, faulty: Tensor, dtype: torch.dtype) -> bool:
    """Equal, or in half precision much nearer to what is wanted than to what a fault makes: deep models differ there
    from themselves in other company by more than any fixed bound."""
    if dtype not in _HALF:
        return _equal(found, wanted, dtype)
    found, wanted, faulty = found.float(), wanted.float(), faulty.float()
    return bool((found - wanted).norm() <= 0.25 * (faulty - wanted).norm())


@torch.no_grad()
def check_causal(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a language model whose earlier predictions change with a later token: encoders that were opened as causal
    models, and what needs more than tokens.

    Args:
        model: in evaluation mode; it is called as it stands.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"expected a causal language model, found {name}, an encoder and a decoder; use a decoder")
    rows = trial_tokens(model, 1, 9, device).repeat(2, 1)
    rows[1, -1] = rows[1, 0]
    if int(rows[0, -1]) == int(rows[1, -1]):
        rows[1, -1] = rows[1, 1]
    try:
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    except _FAILURES as error:
        raise UserError(f"{name} cannot be run as a causal language model: {one_line(error, 200)}") from error
    if logits.isfinite().all() and not _equal(logits[1], logits[0], dtype):
        raise UserError(
            f"expected a causal language model, found {name}, whose predictions look at later tokens; give a decoder, "
            "or score by head"
        )


@torch.no_grad()
def takes_tree_masks(model: nn.Module, dtype: torch.dtype, device: torch.device, path: int = 8, row: int = 16) -> bool:
    """Whether branches behind one prefix, in a row with a 4-D mask, score as they do alone.

    Tried at the sizes that will be used: models with sliding windows lose them behind a given mask, or count them along
    the row, which shows only in rows that are longer than the window.

    In half precision the difference is held against the one that a row without the mask makes, and a window that the
    config declares counts as well.

    Args:
        model: a causal language model in evaluation mode; it is called as it stands.
        path: tokens of the prefix with one branch.
        row: tokens of the whole row, at least.
    """
    half = dtype in _HALF
    if half and (window := window_of(model.config)) is not None and path > window:
        return False
    own = 3  # shorter than any window, or a window that covers a whole branch would hide what it cuts off
    path = max(path, own + 1)
    prefix = path - own
    branches = max(2, -(-(row - prefix) // own))
    tokens = trial_tokens(model, 1, prefix + branches * own, device)
    size = tokens.shape[1]
    starts = [prefix + b * own for b in range(branches)]
    depths = [*range(prefix), *[d for _ in starts for d in range(prefix, path)]]
    places = torch.tensor([depths], device=device)
    ends = [[size] * prefix + [start + own for start in starts for _ in range(own)]]
    asked = [start + own - 1 for start in (starts[0], starts[-1])]

    def scored(ends: list[list[int]]) -> Tensor:
        mask = tree_mask(torch.tensor(ends, device=device), dtype)
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False).logits
        return logits[0, asked].float()

    try:
        tree = scored(ends)
        rows = torch.cat([torch.cat([tokens[:, :prefix], tokens[:, s : s + own]], 1) for s in (starts[0], starts[-1])])
        apart = model(input_ids=rows, use_cache=False).logits[:, -1].float()
        if not half:
            return _equal(tree, apart, dtype)
        chain = scored([[size] * size])
    except _FAILURES:
        return False
    # The last branch sees the first without the mask; where that changes nothing the trial tells nothing.
    return not torch.equal(chain[1], apart[1]) and _as_wanted(tree[1], apart[1], chain[1], dtype)


@torch.no_grad()
def padding_side(model: nn.Module, dtype: torch.dtype, device: torch.device) -> PaddingSide:
    """The side on which a sequence classifier's rows can be padded behind a mask without changing their logits.

    Raises:
        UserError: neither side; nothing says what it pads with.
    """
    name = type(model).__name__
    pad = pad_token(model)
    row = trial_tokens(model, 1, 7, device)
    filled, seen = torch.full((1, 4), pad, device=device), torch.ones_like(row)
    hidden = torch.zeros_like(filled)
    try:
        alone = model(input_ids=row, attention_mask=seen).logits
        shorter = model(input_ids=row[:, :-1], attention_mask=seen[:, :-1]).logits  # as if read at another place
        sides: dict[PaddingSide, slice] = {"right": slice(None), "left": slice(None, None, -1)}
        for side, order in sides.items():
            ids, mask = (torch.cat(pair[order], 1) for pair in ([row, filled], [seen, hidden]))
            if _as_wanted(model(input_ids=ids, attention_mask=mask).logits, alone, shorter, dtype):
                return side
    except _FAILURES as error:
        raise UserError(f"{name} cannot be run as a sequence classifier: {one_line(error, 200)}") from error
    if not alone.isfinite().all():
        return "right"  # said with the name of a row when one is predicted
    raise UserError(f"expected a classifier that takes padded rows, found {name}, whose logits change with the padding")


@torch.no_grad()
def mixing_layer(model: nn.Module, layers: Mapping[str, nn.Module], masked: bool, device: torch.device) -> str | None:
    """The first of some layers to which the rows of a batch do not come one after the other, or None.

    Rows at points of their own are told apart by their order. DeBERTa sends its relative positions through layers once
    for all rows, XLNet's rows lie across, experts see a choice of tokens. Compared is what each layer gets of a row in
    company and alone.

    Args:
        layers: by name.
        masked: whether the model wants a mask (classifiers).
    """
    rows = trial_tokens(model, 2, 7, device)
    seen: dict[str, list[Tensor]] = {}
    note = lambda name: lambda _, args: seen.setdefault(name, []).append(args[0].detach())  # noqa: E731
    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]

    def run(ids: Tensor) -> dict[str, list[Tensor]]:
        seen.clear()
        extra: dict[str, Any] = {"attention_mask": torch.ones_like(ids)} if masked else {"use_cache": False}
        model(input_ids=ids, **extra)
        return dict(seen)

    try:
        both, alone = run(rows), run(rows[1:])
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        for x, own in zip_longest(both.get(name, ()), alone.get(name, ())):
            if x is None or own is None or x.shape[0] % 2 or x.numel() != 2 * own.numel():
                return name
            other, found = x.reshape(2, -1)
            if not _as_wanted(found, own.reshape(-1), other, x.dtype):
                return name
    return None


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Inside the block a model in half precision computes in float32, where its weights are few enough for a copy.

    A trial then sees what the model does and not how it rounds. Weights are the same afterwards, in their places.
    """
    tensors = [*model.parameters(), *model.buffers()]
    half = [t for t in tensors if t.dtype in _HALF]
    attention = str(getattr(model.config, "_attn_implementation", "") or "")
    whole = all(t.is_floating_point() for t in model.parameters()) and not any(hasattr(t, "full_tensor") for t in half)
    kept: list[tuple[Tensor, Tensor]] = []
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    if whole and "flash" not in attention and sum(t.numel() for t in half) <= _MOST_COPIED:
        with torch.inference_mode(False):
            for tensor in half:
                kept.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
        for module, own in buffers:  # XGLM makes new tables of positions where rows are longer
            module._buffers.update(own)


def next_inputs(accepted: Container[str], ids: Tensor, visible: Tensor, cache: Any) -> dict[str, Any]:
    """What a model takes to continue texts by a cache.

    Args:
        accepted: names of the arguments of its forward.
        ids: [N, n] tokens that are not in the cache.
        visible: [N, T] whether each token so far is text (1) or padding in front (0).
        cache: what it returned before; None at first.
    """
    positions = (visible.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    # Only the last position is read; models that cannot leave out the others compute them all.
    wanted: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
    inputs = {name: value for name, value in wanted.items() if name in accepted}
    return inputs | {"input_ids": ids, "attention_mask": visible, "past_key_values": cache, "use_cache": True}


@torch.no_grad()
def decodes_in_batches(model: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether texts of unlike lengths can be continued together from caches behind padding on the left; False: each by
    itself (recurrent layers read padding as text).

    Raises:
        UserError: not even alone; the model keeps no cache.
    """
    name = type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    rows, skipped = trial_tokens(model, 2, 9, device), 3

    def decoded(ids: Tensor, visible: Tensor) -> Tensor:
        cache, seen = None, 0
        for length in (7, 1, 1):  # a prompt and two tokens
            seen += length
            output = model(**next_inputs(accepted, ids[:, seen - length : seen], visible[:, :seen], cache))
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise UserError(f"expected a model that keeps a key-value cache, found {name}; it cannot generate here")
        return output.logits[:, -1]

    visible = torch.ones_like(rows)
    whole = [model(input_ids=ids, use_cache=False).logits[:, -1] for ids in (rows[:1], rows[1:, skipped:])]
    try:
        alone = decoded(rows[:1], visible[:1])
    except _FAILURES as error:
        text = str(error) if isinstance(error, UserError) else f"{name} cannot generate here: {one_line(error, 200)}"
        raise UserError(text) from error
    if whole[0].isfinite().all() and not _as_wanted(alone, whole[0], whole[1], dtype):
        raise UserError(f"expected a model that continues texts from its cache as without, found {name}")
    visible[1, :skipped] = 0
    try:
        together = decoded(rows, visible)
    except _FAILURES:
        return False
    unmasked = model(input_ids=rows[1:], use_cache=False).logits[:, -1]
    return _as_wanted(together[:1], whole[0], whole[1], dtype) and _as_wanted(together[1:], whole[1], unmasked, dtype)


class _Lookups(TorchFunctionMode):
    """Notes the first place and the size of every table of which consecutive rows are looked up."""

    def __init__(self, words: Tensor | None) -> None:
        super().__init__()
        self.words = words
        self.limits: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding and args[1] is not self.words:
            places = args[0].reshape(-1).tolist()
            own, filled = places[:_SHORT], places[_SHORT:]  # Longformer fills rows up to its window
            if len(own) == _SHORT and own == [*range(own[0], own[0] + _SHORT)] and len({*filled}) < 2:
                self.limits.append(args[1].shape[0] - own[0])
        return func(*args, **(kwargs or {}))


_SHORT = 5


@torch.no_grad()
def position_limit(model: nn.Module) -> int | None:
    """How many tokens the model's learned position embeddings can tell apart, None without any.

    RoBERTa's configs say 514 of which 512 can be used, OPT's say two fewer than the table has. What counts is which
    rows of which table a short text takes: as many as it has tokens, one after the other.

    Args:
        model: in evaluation mode; it is called as it stands.
    """
    words = _word_embeddings(model)
    if not any(isinstance(m, nn.Embedding) and m.weight is not words for m in model.modules()):
        return None
    device = next(model.parameters()).device
    try:
        with _Lookups(words) as lookups:
            model(input_ids=trial_tokens(model, 1, _SHORT, device))
    except _FAILURES:
        return None
    return min(lookups.limits, default=None)
