"""EleutherAI's lm-evaluation-harness on a curve's model average.

    python -m loracurve.runs.lm_eval --model loracurve --model_args run=RUN --tasks arc_easy

is the command `lm_eval` with one more model; from Python, `simple_evaluate(model=harness_class()(run=RUN), ...)`. A
continuation's log-likelihood is log sum_i w_i p_i(continuation | context), the average over the curve's points in
probability space; it counts as greedy where every token is the most probable one of the points' weighted mean.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loracurve.inference.information import mixture_log_probs
from loracurve.model.curve_model import CurveModel
from loracurve.model.runner import evaluation_mode
from loracurve.runs.run import open_run
from loracurve.system.errors import UserError
from loracurve.tasks.batching import Batch, collate
from loracurve.tasks.dataset import check_text
from loracurve.tasks.encoding import Encoded, Example
from loracurve.tasks.tokens import choice_tokens, leading_tokens, split_lead, tokenise, with_lead

__all__ = ["Scorer", "harness_class", "rolling_windows"]


# Log-probabilities over the vocabulary at all points that exist at one time, and tokens of a batch.
AT_ONCE = 2**27

BATCH_TOKENS = 4096


class Scorer:
    """Log-likelihoods of texts under a model average.

    Args:
        model: a causal language model with a curve.
        tokenizer: its tokenizer; leading special tokens are put in front as in training, where a text has none itself.
        t, weights: points of the curve and their weights, [n].
        window: longest input in tokens; longer contexts are cut on the left. None: unlimited.
    """

    def __init__(
        self, model: CurveModel, tokenizer: PreTrainedTokenizerBase, t: Tensor, weights: Tensor, window: int | None
    ) -> None:
        if model.is_classifier:
            raise UserError("expected a run with a language-model head, found a sequence classifier; use another run")
        self.model, self.tokenizer, self.t, self.weights, self.window = model, tokenizer, t, weights, window
        self.lead = leading_tokens(tokenizer)

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy) of each (context, continuation)."""
        for number, pair in enumerate(pairs, start=1):
            for text in pair:
                check_text(text, f"request {number}")
        split = choice_tokens(self.tokenizer, [p for p, _ in pairs], [[c] for _, c in pairs])
        rows = [self._row(prompt, rest) for prompt, (rest,) in split]
        logs, greedy = self._score(rows)
        return list(zip(mixture_log_probs(logs, self.weights).tolist(), greedy.tolist(), strict=True))

    def texts(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood in nats of each whole text, read through windows (`rolling_windows`)."""
        rows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, text in enumerate(texts, start=1):
            check_text(text, f"request {number}")
        for number, ids in enumerate(tokenise(self.tokenizer, texts)):
            start, tokens = self._row([], ids)
            windows = rolling_windows(tokens, start[-1], self.window or len(tokens))
            rows += windows
            owners += [number] * len(windows)
        total = torch.zeros(len(self.t), len(texts), dtype=torch.float64)
        if rows:
            total.index_add_(1, torch.tensor(owners), self._score(rows)[0])
        # A text is one sequence for each point, whatever its windows: averaged once.
        return mixture_log_probs(total, self.weights).tolist()

    def _row(self, prompt: list[int], rest: list[int]) -> tuple[list[int], list[int]]:
        """(what comes before a continuation, the continuation), which may begin with leading tokens itself."""
        head, body = split_lead(self.lead, [*prompt, *rest])
        asked = max(len(body) - len(rest), 0)
        return self._start([*head, *body[:asked]]), body[asked:]

    def _start(self, prompt: list[int]) -> list[int]:
        """What comes before a continuation, at least one token to predict from: without any BOS, else EOS, as the
        harness has it."""
        start = with_lead(self.lead, prompt)
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        first = next((int(token) for token in known if token is not None), None)
        if not start and first is None:
            raise UserError("expected a context or a tokenizer with a BOS or EOS token, found none")
        return start or [first]  # type: ignore[list-item]

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """[n, R] log-likelihoods of continuations at each point, float64, and [R] whether they are greedy."""
        examples = [self._example(str(i), *row) for i, row in enumerate(rows)]
        encoded = Encoded(examples, "lm", None, (), "sum", 0, self.tokenizer.pad_token_id or 0)
        ends = torch.tensor(encoded.token_offsets[1:])
        total = torch.zeros(len(self.t), len(rows), dtype=torch.float64)
        misses = torch.zeros(len(rows), dtype=torch.long)
        with torch.inference_mode(), evaluation_mode(self.model):
            for batch in self._batches(encoded):
                log_probs = self.model.point_log_probs(batch, self.t)
                labels = batch.labels.to(log_probs.device)
                chosen = log_probs.gather(-1, labels.expand(len(self.t), -1)[..., None])[..., 0].double().cpu()
                missed = (mixture_log_probs(log_probs, self.weights).argmax(-1) != labels).long().cpu()
                owner = torch.bucketize(batch.index, ends, right=True)
                total.index_add_(1, owner, chosen)
                misses.index_add_(0, owner, missed)
        return total, misses == 0

    def _example(self, name: str, start: list[int], rest: list[int]) -> Example:
        if not rest:
            raise UserError("expected continuations of at least one token, found an empty one")
        if self.window is not None and len(rest) > self.window:
            raise UserError(f"expected continuations of at most {self.window} tokens, found one of {len(rest)}")
        # The last token is predicted and never read.
        kept = start if self.window is None else start[-(self.window + 1 - len(rest)) :]
        return Example(name, tuple(kept), (tuple(rest),), None, 1)

    def _batches(self, encoded: Encoded) -> Iterator[Batch]:
        """All rows, similar contexts together, as many as tokens and vocabulary allow."""
        examples = encoded.examples
        head: Any = self.model.model.get_output_embeddings()  # type: ignore[operator]
        most = max(AT_ONCE // (len(self.t) * head.weight.shape[0]), 1)
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i].prompt), examples[i].prompt))
        numbers: list[int] = []
        read = tokens = 0
        for i in order:
            own = len(examples[i].choices[0])
            longer = tokens + len(examples[i].prompt) + own
            if numbers and (read + own > most or longer > BATCH_TOKENS):
                yield collate(encoded, numbers, packing=self.model.runner.takes_trees(encoded))
                numbers, read, longer = [], 0, len(examples[i].prompt) + own
            numbers.append(i)
            read, tokens = read + own, longer
        if numbers:
            yield collate(encoded, numbers, packing=self.model.runner.takes_trees(encoded))


def rolling_windows(tokens: Sequence[int], first: int, window: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs in which each token is predicted once, from as much context as `window` allows.

    `first` stands before the text. The last window reaches back beyond the one before it.
    """
    out = []
    for start in range(0, len(tokens), max(window, 1)):
        end = min(start + window, len(tokens))
        context = [first] if start == 0 else list(tokens[end - 1 - window : start])
        out.append((context, list(tokens[start:end])))
    return out


def harness_class() -> type[Any]:
    """The harness's model class, registered as `loracurve`; raises UserError where the harness is not installed."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import model_registry, register_model
    except ImportError as error:
        raise UserError("expected the package lm-eval, found none; pip install lm-eval") from error
    import lm_eval.models  # noqa: F401  (its models are registered first, else they would never be)

    if "loracurve" in model_registry:
        found: type[Any] = model_registry.get("loracurve")
        return found

    @register_model("loracurve")
    class LoraCurveLM(LM):
        """A fitted run: `run=DIR`, and if wanted `points=10`, `weights=uniform|arc-length|likelihood` and `base=DIR`.

        Device and batch size that the harness passes are left aside: the device is as for all commands, batches go by
        tokens.
        """

        def __init__(
            self,
            run: str,
            points: int | None = None,
            weights: str | None = None,
            base: str | None = None,
            **_: Any,
        ) -> None:
            super().__init__()
            opened = open_run(run, base=base)
            changes: dict[str, Any] = {k: v for k, v in (("points", points), ("weights", weights)) if v is not None}
            average = opened.average(replace(opened.config.evaluation, **changes))
            window = opened.model.window
            self.scorer = Scorer(opened.model, opened.task.tokenizer, average.t, average.weights, window)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return self.scorer.continuations([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return self.scorer.texts([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            raise UserError("expected tasks that score given answers, found one that generates text; choose others")

        @property
        def tokenizer_name(self) -> str:
            return str(self.scorer.tokenizer.name_or_path).replace("/", "__")

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            tokenizer: Any = self.scorer.tokenizer
            text: str = tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

    return LoraCurveLM


def main() -> int:
    """The command `lm_eval` with the model `loracurve`."""
    try:
        harness_class()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except UserError as error:
        print(f"loracurve.runs.lm_eval: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
