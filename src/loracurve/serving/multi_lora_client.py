"""A client that averages the answers of a server which holds n points of a curve as LoRA adapters.

The server speaks OpenAI's completions API with `logprobs` (vLLM does) and knows each point by the name of its folder,
as `loracurve export` wrote them. What comes next is one request for each point, all of them at once; many prompts are
several. Log-probabilities of the prompt itself are asked for one text at a time.
"""

from __future__ import annotations

import http.client
import json
import math
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracurve.curve.index import read_index
from loracurve.inference.predictive import Predictive
from loracurve.system.errors import UserError
from loracurve.tasks.tokens import common_prefix

__all__ = ["NextToken", "ServedCurve", "ServedText"]


_MOST_BYTES = 2**26  # of one answer

_MOST_PROMPTS = 256  # in one request; vLLM takes 1024

_MOST_TOKENS = 128  # whose log-probabilities vLLM lists by their ids

_AT_ONCE = 16  # texts that are tokenised


class _RefusedError(UserError):
    """The server answered with a status."""


@dataclass(frozen=True)
class NextToken:
    """The averaged distribution of the next token, over the tokens that every point listed and one class for the rest.

    Merging tokens into a class never raises an entropy or a divergence, so that the entropies, in nats, are lower
    bounds of those over the whole vocabulary.
    """

    tokens: tuple[str, ...]
    """most probable first"""
    probs: tuple[float, ...]
    """exact averages"""
    rest: float
    """probability of all other tokens together"""
    entropy: float
    expected_entropy: float
    mutual_information: float
    ends: bool
    """the most probable token ends the text"""

    @property
    def certain(self) -> bool:
        """Whether the first token is the most probable of the whole vocabulary, and not only of those listed."""
        return self.probs[0] >= self.rest


@dataclass
class ServedText:
    """A text generated token by token."""

    text: str = ""
    steps: list[NextToken] = field(default_factory=list)
    """one for each token, the one that ended the text included"""
    finish: str = "length"
    """eos or length"""


class ServedCurve:
    """Points of a curve behind an OpenAI-style completions API.

    Args:
        url: of the server, such as http://127.0.0.1:8000; /v1/completions and /tokenize are asked.
        index: index.json of `loracurve export`, or the folder that holds it. The folders' names are the models' names.
        api_key: sent as a bearer token where the server wants one.
        timeout: seconds that the server may be silent.
        top: tokens listed at each place. vLLM's default limit is 20 (`--max-logprobs`).

    Raises:
        UserError: no such file, something else in it, or a URL that is not of HTTP.
    """

    def __init__(
        self, url: str, index: str | Path, api_key: str | None = None, timeout: float = 60.0, top: int = 20
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"url: expected one that begins with http:// or https://, found {url!r}")
        if not timeout > 0 or top < 1:
            raise UserError(f"expected timeout > 0 and top >= 1, found {timeout} and {top}")
        self.models, self.weights = read_index(index)
        self.url, self.api_key, self.timeout, self.top = url.rstrip("/"), api_key, timeout, top

    def choices(self, prompts: str | Sequence[str], answers: Sequence[str], unknowns: bool = False) -> Predictive:
        """Probabilities of answers as continuations of prompts, averaged over the points: exact, as in training.

        At each point the softmax over the answers' log-likelihoods (sums over their tokens). The part that all of them
        share is the same for each and cancels. Where each answer is one token behind that part, these are the
        log-probabilities of the next token, many prompts in one request; else they are read off the echoed text.

        Args:
            prompts: E prompts.
            answers: C continuations, with their leading space where they need one.
            unknowns: ask for the part of the uncertainty within the points and for familiarity, which is refused:
                both are read from hidden states, which such a server does not give.

        Returns:
            The `Predictive` of E examples and C classes at n points, with two parts of the uncertainty.

        Raises:
            UserError: unknowns were asked for; the server cannot be reached, is too slow, or answers something else.
        """
        if unknowns:
            raise UserError(
                f"{self.url}: expected a model whose hidden states can be read, found a completions API, which gives "
                "none: the part within the points and familiarity come from loracurve predict, serve or open_average"
            )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or len(set(answers)) < 2 or len(set(answers)) < len(answers) or not all(answers):
            raise UserError(f"expected prompts and at least two different answers, found {len(texts)} and {answers}")
        ids = self._tokenised([text + answer for text in texts for answer in answers])
        groups: dict[tuple[int, ...], list[int]] = {}
        for e in range(len(texts)):
            groups.setdefault(_last_tokens(ids[e * len(answers) : (e + 1) * len(answers)]), []).append(e)
        scores = torch.empty(len(self.models), len(texts), len(answers), dtype=torch.float64)
        for tokens, rows in groups.items():
            if tokens:
                scores[:, rows] = self._next_scores([ids[e * len(answers)][:-1] for e in rows], tokens)
            else:
                scores[:, rows] = self._echoed_scores([[texts[e] + answer for answer in answers] for e in rows])
        return Predictive.from_log_probs(scores.log_softmax(-1), self.weights)

    def next_token(self, prompt: str) -> NextToken:
        """The averaged distribution of the token behind `prompt`; errors as `choices`."""
        asked = {"prompt": prompt, "max_tokens": 1, "logprobs": self.top, "temperature": 0}
        listed: list[dict[str, float]] = []
        ends: set[str] = set()
        for model, (choice,) in zip(self.models, self._ask(asked, 1), strict=True):
            try:
                listed.append({str(k): float(v) for k, v in choice["logprobs"]["top_logprobs"][0].items()})
                if choice.get("finish_reason") == "stop":
                    ends.add(str(choice["logprobs"]["tokens"][0]))
            except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
                raise self._unlike(model, "top_logprobs of one token") from error
        common = [token for token in listed[0] if all(token in other for other in listed)]
        if not common:
            raise UserError(f"the points have none of their {self.top} most probable tokens in common; raise top")
        known = torch.tensor([[other[token] for token in common] for other in listed], dtype=torch.float64)
        rest = (1 - known.exp().sum(-1, keepdim=True)).clamp_min(0)
        averaged = Predictive.from_log_probs(torch.cat([known, rest.log()], -1).log_softmax(-1)[:, None], self.weights)
        *probs, beside = averaged.probs[0].tolist()
        order = sorted(range(len(common)), key=lambda i: -probs[i])
        return NextToken(
            tuple(common[i] for i in order),
            tuple(probs[i] for i in order),
            beside,
            float(averaged.entropy[0]),
            float(averaged.expected_entropy[0]),
            float(averaged.mutual_information[0]),
            common[order[0]] in ends,
        )

    def generate(self, prompt: str, max_new_tokens: int = 64, stop: Sequence[str] = ()) -> ServedText:
        """Continue a prompt by the most probable token of the average at each step, as `loracurve.generate` does.

        The text goes back to the server at each step, which tokenises it anew. That may give other tokens than those it
        was made of, at blank lines above all. n requests for each token; servers with a prefix cache compute little
        twice.

        Args:
            stop: names of tokens that end the text, beside the one that the server itself stops at.
        """
        out = ServedText()
        for _ in range(max_new_tokens):
            step = self.next_token(prompt + out.text)
            if step.tokens[0].startswith("token_id:"):
                raise UserError(
                    f"{self.url}: expected tokens as text, found {step.tokens[0]!r}; start the server without "
                    "--return-tokens-as-token-ids"
                )
            out.steps.append(step)
            if step.ends or step.tokens[0] in stop:
                out.finish = "eos"
                break
            out.text += step.tokens[0]
        return out

    def _tokenised(self, texts: Sequence[str]) -> list[list[int]]:
        """The server's token ids of each text; of none, where it does not tell them."""
        try:
            first = self._token_ids(texts[0])
        except _RefusedError:  # it knows no such question, or will refuse the next one too
            return [[] for _ in texts]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return [first, *pool.map(self._token_ids, texts[1:])]

    def _token_ids(self, text: str) -> list[int]:
        model = self.models[0]
        answer = self._post("/tokenize", {"model": model, "prompt": text})
        try:
            return [int(x) for x in answer["tokens"]]
        except (KeyError, TypeError, ValueError) as error:
            raise self._unlike(model, "token ids of a text") from error

    def _next_scores(self, prompts: list[list[int]], tokens: Sequence[int]) -> Tensor:
        """[n, E, C] log-probabilities of C tokens behind E prompts, both given by ids."""
        asked = {
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": len(tokens),
            "logprob_token_ids": tokens,
            "return_tokens_as_token_ids": True,
        }
        parts = []
        for some in (prompts[i : i + _MOST_PROMPTS] for i in range(0, len(prompts), _MOST_PROMPTS)):
            found = self._ask({"prompt": some, **asked}, len(some))
            try:
                listed = [[c["logprobs"]["top_logprobs"][0] for c in choices] for choices in found]
                parts.append([[[float(one[f"token_id:{x}"]) for x in tokens] for one in point] for point in listed])
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise self._unlike("a point", "top_logprobs of the tokens in logprob_token_ids") from error
        return torch.cat([torch.tensor(part, dtype=torch.float64) for part in parts], dim=1)

    def _echoed_scores(self, texts: list[list[str]]) -> Tensor:
        """[n, E, C] log-likelihoods of the ends of E x C texts, up to a constant for each of the E."""
        return torch.tensor([[self._ends(m, own) for own in texts] for m in self.models], dtype=torch.float64)

    def _ends(self, model: str, texts: list[str]) -> list[float]:
        """Of each text, the log-likelihood of what follows on the part that all share."""
        # One text after the other, at all points: with adapters, vLLM's CPU engine (0.32) scores a prompt's own tokens
        # only while no other sequence is in the batch, and ends where there is one.
        asked = {"max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        choices = [self._answers(model, {"prompt": text, **asked}, 1)[0] for text in texts]
        try:
            found = [(c["logprobs"]["tokens"], c["logprobs"]["token_logprobs"]) for c in choices]
            shared = common_prefix([tokens for tokens, _ in found])
            return [math.fsum(values[shared:]) for _, values in found]
        except (KeyError, TypeError, ValueError) as error:
            raise self._unlike(model, "token_logprobs of the echoed text") from error

    def _ask(self, asked: dict[str, Any], count: int) -> list[list[dict[str, Any]]]:
        """The same question to every point at once: for each point `count` answers in the order of the prompts."""
        with ThreadPoolExecutor(len(self.models)) as pool:
            return list(pool.map(lambda model: self._answers(model, asked, count), self.models))

    def _answers(self, model: str, asked: dict[str, Any], count: int) -> list[dict[str, Any]]:
        answer = self._post("/v1/completions", {"model": model, **asked})
        try:
            found = sorted(answer["choices"], key=lambda c: c["index"])
        except (KeyError, TypeError) as error:
            raise self._unlike(model, "choices with an index") from error
        if len(found) != count:
            raise self._unlike(model, f"{count} choices instead of {len(found)}")
        return found

    def _post(self, path: str, asked: dict[str, Any]) -> Any:
        address = self.url + path
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(address, json.dumps(asked).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                body = response.read(_MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(500).decode(errors="replace").split())[:200]
            advice = f"; does it serve the adapter {asked['model']!r}?" if error.code == 404 else ""
            message = f"{address} refuses {asked['model']!r} with status {error.code}: {said}{advice}"
            raise _RefusedError(message) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise UserError(f"{address}: expected an answer within {self.timeout:g} s, found none") from error
            raise UserError(f"{address}: expected a server, found none ({reason}); is it running?") from error
        if len(body) > _MOST_BYTES:
            raise UserError(f"{address}: expected an answer of at most {_MOST_BYTES} bytes, found more; ask for less")
        try:
            return json.loads(body)
        except ValueError as error:
            raise UserError(f"{address}: expected JSON, found something else; is it a completions API?") from error

    def _unlike(self, model: str, expected: str) -> UserError:
        return UserError(f"{self.url}: expected {expected} from {model}, found something else; does it give logprobs?")


def _last_tokens(texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The last tokens of the texts, where they differ in these alone; none where in others, or too many to ask for."""
    shared = common_prefix(texts)
    alone = shared > 0 and all(len(ids) == shared + 1 for ids in texts) and len(texts) <= _MOST_TOKENS
    return tuple(ids[-1] for ids in texts) if alone else ()
