"""Decoding with the model average: every token is drawn from the average of the points' next-token distributions.

All points run in one batch, each with a key-value cache of its own, and continue with the one token that was chosen
for all of them. The uncertainty of each token splits as that of any prediction: entropy of the average = expected
entropy + mutual information (`inference.predictive`). Top-p sampling: Holtzman et al. 2020, section 3.1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loracurve.curve.quadrature import quadrature
from loracurve.inference.config import GenerateConfig
from loracurve.inference.information import entropy, mixture_log_probs
from loracurve.model.curve_model import CurveModel
from loracurve.model.declared import check_lengths
from loracurve.model.runner import evaluation_mode
from loracurve.model.trials import next_inputs
from loracurve.system.errors import UserError
from loracurve.system.randomness import generator
from loracurve.tasks.dataset import check_text
from loracurve.tasks.tokens import leading_tokens, tokenise, with_lead

__all__ = ["Generation", "choose_tokens", "generate"]


@dataclass
class Generation:
    """A generated text, token by token. Entropies in nats, of the average before temperature and top-p."""

    prompt: str
    text: str = ""
    """without the prompt and without special tokens"""
    token_ids: list[int] = field(default_factory=list)
    """the end-of-sequence token included, where one was generated"""
    tokens: list[str] = field(default_factory=list)
    """what each token adds to the text; "" while a character is incomplete, the name of the end-of-sequence token"""
    log_probs: list[float] = field(default_factory=list)
    """log p(token) under the average"""
    entropy: list[float] = field(default_factory=list)
    """total uncertainty"""
    expected_entropy: list[float] = field(default_factory=list)
    """aleatoric: the weighted mean of the points' entropies"""
    mutual_information: list[float] = field(default_factory=list)
    """epistemic: what the points disagree on"""
    weights: list[float] = field(default_factory=list)
    """weights of the points behind the last token"""
    finish: Literal["eos", "length"] = "length"
    """the text ended by itself, or was cut at max_new_tokens"""
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    """the most probable tokens at each place and their log p under the average, where they were asked for"""
    prompt_tokens: int = 0
    """tokens of the prompt, those put in front included"""

    def record(self) -> dict[str, Any]:
        """The same for JSON, figures rounded to six places."""
        values = asdict(self)
        for name, value in values.items():
            if isinstance(value, list) and value and isinstance(value[0], float):
                values[name] = [round(v, 6) for v in value]
        values["alternatives"] = [[(token, round(v, 6)) for token, v in place] for place in self.alternatives]
        return values


def generate(
    model: CurveModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    config: GenerateConfig | None = None,
    t: Tensor | None = None,
    weights: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Generation]:
    """Continue prompts by the average over points of a curve.

    Args:
        model: a curve on a causal language model.
        tokenizer: the base model's, a fast one. Its leading special tokens (BOS) are put in front of each prompt
            that does not begin with them itself.
        prompts: one text or several, continued as they stand; apply a chat template before, if the model wants one.
        config: how to decode. Default: greedy, 64 tokens.
        t: points ``[n]``, or ``[n, K]`` coefficients of points off the curve. Default: 10, equally spaced.
        weights: weights ``[n]`` of the points, summing to 1. Default: equal.
        progress: called after each step with the number of tokens that the prompts of this batch have by then.
        numbers: which stream of draws each prompt has. Default: its place. So prompts of several callers can be decoded
            together, each with the draws that it has alone.

    Returns:
        One `Generation` for each prompt, in order.

    Raises:
        UserError: a classifier or a model without a cache; no prompts, empty ones, or ones that leave no room for
            `max_new_tokens` in the model's window; a slow tokenizer.
    """
    config = config or GenerateConfig()
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if model.is_classifier:
        raise UserError("generate: expected a causal language model, found a classifier, which has no text to continue")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("generate: expected a fast tokenizer, found a slow one; load it by AutoTokenizer")
    if t is None:
        t, _ = quadrature("uniform", 10, model.spec.segments, closed=model.spec.closed)
    weights = torch.full((len(t),), 1 / len(t)) if weights is None else weights
    sequences = _tokenised(tokenizer, texts, config.max_new_tokens, model.window)
    lengths = [len(ids) for ids in sequences]
    check_lengths(model.model.config, min(lengths), max(lengths) + config.max_new_tokens)
    numbers = range(len(texts)) if numbers is None else numbers
    out: list[Generation] = []
    size = config.batch_size if model.runner.decodes_in_batches() else 1
    with torch.inference_mode(), evaluation_mode(model):
        for start in range(0, len(texts), size):
            part = range(start, min(start + size, len(texts)))
            streams = [numbers[i] for i in part]
            batch = _Batch([texts[i] for i in part], [sequences[i] for i in part], streams, tokenizer, config)
            out += batch.decode(model, t, weights, _end_tokens(model, tokenizer), progress)
    return out


def choose_tokens(log_probs: Tensor, config: GenerateConfig, uniform: Tensor | None = None) -> Tensor:
    """One token for each row ``[N, V]`` of averaged log-probabilities, ``[N]``.

    Args:
        uniform: ``[N]`` numbers in [0, 1) that decide on the draws (inverse distribution function over the tokens in
            descending order of probability); not needed for temperature 0.
    """
    if config.temperature == 0:
        return log_probs.argmax(-1)
    assert uniform is not None
    probs = (log_probs.double().cpu() / config.temperature).softmax(-1)
    probs, order = probs.sort(dim=-1, descending=True, stable=True)
    before = probs.cumsum(-1) - probs
    kept = torch.where(before < config.top_p, probs, 0)
    reached = kept.cumsum(-1)
    # The first token whose cumulative probability is above the drawn one; rounding must not lead behind the last.
    place = (reached <= uniform[:, None] * reached[:, -1:]).sum(-1).clamp_max((kept > 0).sum(-1) - 1)
    return order.gather(-1, place[:, None])[:, 0].to(log_probs.device)


class _Batch:
    """Prompts that are decoded together; `numbers` are those of their streams of draws."""

    def __init__(
        self,
        prompts: Sequence[str],
        sequences: Sequence[list[int]],
        numbers: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        config: GenerateConfig,
    ) -> None:
        self.sequences, self.numbers, self.tokenizer, self.config = sequences, numbers, tokenizer, config
        self.generations = [
            Generation(prompt, prompt_tokens=len(ids)) for prompt, ids in zip(prompts, sequences, strict=True)
        ]
        self.streams = [DecodeStream(ids=list(ids), skip_special_tokens=True) for ids in sequences]

    def decode(
        self, model: CurveModel, t: Tensor, weights: Tensor, ends: set[int], progress: Callable[[int], None] | None
    ) -> list[Generation]:
        config, device = self.config, model.device
        log_weights = weights.to(device, torch.float32).log()[:, None].repeat(1, len(self.sequences))
        accepted = inspect.signature(model.model.forward).parameters
        ids, visible = (x.to(device) for x in _pad_left(self.sequences))
        cache: Any = None
        for step in range(config.max_new_tokens):
            output = model(t, **next_inputs(accepted, ids, visible, cache))
            cache = output.past_key_values
            log_probs = output.logits[:, -1].float().log_softmax(-1).unflatten(0, (len(t), -1))
            average = mixture_log_probs(log_probs, log_weights.exp())
            total = entropy(average)
            if not bool(total.isfinite().all()):
                raise UserError(
                    "generate: the model's outputs are no numbers (NaN or infinite); does the base work in this dtype "
                    "without adapters?"
                )
            expected = (log_weights.exp() * entropy(log_probs)).sum(0).minimum(total)  # equal points, up to rounding
            uniform = None
            if config.temperature:
                draws = (generator(config.seed, "generate", number, step) for number in self.numbers)
                uniform = torch.stack([torch.rand((), generator=draw, dtype=torch.float64) for draw in draws])
            chosen = choose_tokens(average, config, uniform)
            log_prob = average.gather(-1, chosen[:, None])[:, 0]
            if config.weights == "sequence":
                of_token = log_probs.gather(-1, chosen.expand(len(t), -1)[..., None])[..., 0]
                log_weights = (log_weights + of_token).log_softmax(0)
            columns = torch.stack([log_prob, total, expected, total - expected]).tolist()
            best = average.topk(min(config.alternatives, average.shape[-1]))
            alternatives = [
                list(zip(*both, strict=True)) for both in zip(best[1].tolist(), best[0].tolist(), strict=True)
            ]
            for row, (generation, token) in enumerate(zip(self.generations, chosen.tolist(), strict=True)):
                if generation.finish == "length":
                    self._append(row, token, [column[row] for column in columns], log_weights[:, row], ends)
                    if config.alternatives:
                        generation.alternatives.append(alternatives[row])
            if progress is not None:
                progress(step + 1)
            if all(generation.finish == "eos" for generation in self.generations):
                break
            # Finished rows go on with tokens that nobody reads.
            ids = chosen[:, None]
            visible = torch.cat([visible, torch.ones_like(ids)], dim=-1)
        return self.generations

    def _append(self, row: int, token: int, values: list[float], log_weights: Tensor, ends: set[int]) -> None:
        generation = self.generations[row]
        if token in ends:
            generation.finish = "eos"
            piece = str(self.tokenizer.convert_ids_to_tokens(token))
        else:
            backend: Any = self.tokenizer
            piece = self.streams[row].step(backend._tokenizer, token) or ""
            generation.text += piece
        generation.token_ids.append(token)
        generation.tokens.append(piece)
        lists = (generation.log_probs, generation.entropy, generation.expected_entropy, generation.mutual_information)
        for values_so_far, value in zip(lists, values, strict=True):
            values_so_far.append(value)
        generation.weights = log_weights.exp().tolist()


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], new_tokens: int, window: int | None
) -> list[list[int]]:
    """Token ids of the prompts behind their leading special tokens, checked to leave room."""
    if not texts:
        raise UserError("generate: expected at least one prompt, found none")
    places = ["the prompt"] if len(texts) == 1 else [f"prompt {number}" for number in range(1, len(texts) + 1)]
    for where, text in zip(places, texts, strict=True):
        check_text(text, where)
    lead = leading_tokens(tokenizer)
    sequences = [with_lead(lead, ids) for ids in tokenise(tokenizer, texts)]
    for where, ids in zip(places, sequences, strict=True):
        if not ids:
            raise UserError(f"{where}: expected some text, found none, and this tokenizer puts no token in front")
        if window is not None and len(ids) + new_tokens > window:
            raise UserError(
                f"{where}: expected at most {window} tokens with {new_tokens} new ones, found {len(ids)} + "
                f"{new_tokens}; shorten it or lower max_new_tokens"
            )
    return sequences


def _end_tokens(model: CurveModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a text, by the tokenizer and by the model's generation config."""
    settings = getattr(model.model, "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _pad_left(sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``[N, T]``: shorter sequences have padding in front."""
    size = max(map(len, sequences))
    ids = torch.tensor([[0] * (size - len(s)) + s for s in sequences])
    return ids, torch.tensor([[0] * (size - len(s)) + [1] * len(s) for s in sequences])
