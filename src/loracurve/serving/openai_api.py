"""What clients of OpenAI's API send and get: /v1/completions, /v1/chat/completions and /v1/models.

Shapes are those of its reference; texts are those of `inference.generation`. Each choice has one field more,
`uncertainty`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field

from loracurve.inference.config import MOST_ALTERNATIVES, GenerateConfig
from loracurve.system.errors import UserError

__all__ = ["ChatRequest", "CompletionRequest", "chat_prompt", "completion", "decoding", "models"]


class _Request(BaseModel):
    # What says nothing about the text (user, metadata, store) is let through, as OpenAI's server does.
    model_config = ConfigDict(extra="allow")
    model: str = Field(description="Name of the run, as GET /v1/models has it.")
    max_tokens: int | None = Field(None, description="Most new tokens.")
    temperature: float | None = Field(None, allow_inf_nan=False, description="1 where it is not said; 0 is greedy.")
    top_p: float | None = Field(None, allow_inf_nan=False, description="As in /generate.")
    seed: int | None = Field(None, description="Of the draws; a fresh one for each request where none is said.")
    n: int | None = Field(None, ge=1, description="Texts for each prompt, each with draws of its own.")


class CompletionRequest(_Request):
    """Texts to continue, as OpenAI's clients send them."""

    prompt: str | list[str] = Field(description="Continued as it stands.")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="Log-probabilities, and of so many most probable tokens too."
    )


class TextPart(BaseModel):
    """A piece of a message."""

    type: str = Field(description="text; others are refused.", pattern="^text$")
    text: str = Field(description="Its text.")


class Message(BaseModel):
    """A turn of a conversation."""

    role: str = Field(description="As the chat template has it: system, user, assistant.")
    content: str | list[TextPart] = Field(description="Its text.")


class ChatRequest(_Request):
    """A conversation to continue, as OpenAI's clients send it."""

    messages: list[Message] = Field(min_length=1, description="Put into the tokenizer's chat template.")
    max_completion_tokens: int | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Whether to give log-probabilities of the tokens.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="Of so many most probable tokens too; needs logprobs."
    )


# Fields that would change the text: the values at which they change nothing.
_NEUTRAL: dict[str, Sequence[Any]] = {
    "stream": (None, False),
    "stop": (None, "", []),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}


def decoding(body: CompletionRequest | ChatRequest, name: str, most_tokens: int) -> GenerateConfig:
    """How to decode what a request asks for.

    Args:
        name: the run's.
        most_tokens: that a request may ask for.

    Raises:
        UserError: another model, a field that this server does not serve, or a value out of its range.
    """
    if body.model != name:
        raise UserError(f"model: expected {name!r}, found {body.model[:80]!r}; GET /v1/models lists it")
    for field, values in _NEUTRAL.items():
        found = (body.model_extra or {}).get(field)
        if found not in values:
            raise UserError(f"{field}: expected none or {values[1]!r}, found {str(found)[:80]!r}; leave it out")
    temperature = 1.0 if body.temperature is None else body.temperature
    if (body.n or 1) > 1 and temperature == 0:
        raise UserError(f"n: expected 1 with temperature 0, which is greedy, found {body.n}; draw at 1.0")
    asked, top = body.max_tokens, body.logprobs or 0
    if isinstance(body, ChatRequest):
        if body.max_completion_tokens is not None:
            if asked not in (None, body.max_completion_tokens):
                raise UserError("max_tokens: expected one of max_tokens and max_completion_tokens, found both")
            asked = body.max_completion_tokens
        if body.top_logprobs and not body.logprobs:
            raise UserError("top_logprobs: expected logprobs true beside it, found none; set it")
        top = body.top_logprobs or 0
    return GenerateConfig(
        max_new_tokens=min(GenerateConfig.max_new_tokens, most_tokens) if asked is None else asked,
        temperature=temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        # Clients that draw several texts by several requests mean different ones.
        seed=(0 if temperature == 0 else secrets.randbelow(2**31)) if body.seed is None else body.seed,
        alternatives=top,
    )


def chat_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text of a conversation up to where the answer begins. Raises UserError without a chat template."""
    if not tokenizer.chat_template:
        raise UserError("expected a tokenizer with a chat template, found one without; use /v1/completions")
    turns = [
        {"role": m.role, "content": m.content if isinstance(m.content, str) else "".join(p.text for p in m.content)}
        for m in messages
    ]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"messages: expected ones that the chat template takes, found others ({error})") from None
    return text


def completion(
    body: CompletionRequest | ChatRequest,
    name: str,
    config: GenerateConfig,
    tokenizer: Any,
    generations: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The answer to a request: a choice for each of its generations (`Generation.record`)."""
    chat = isinstance(body, ChatRequest)
    choices: list[dict[str, Any]] = []
    for i, made in enumerate(generations):
        said: dict[str, Any] = {"text": made["text"]}
        if chat:
            said = {"message": {"role": "assistant", "content": made["text"], "refusal": None}}
        logprobs = None
        if body.logprobs is not None and body.logprobs is not False:
            logprobs = (_of_chat if chat else _of_completion)(made, tokenizer)
        finish = {"eos": "stop", "length": "length"}[made["finish"]]
        choices.append(
            {"index": i, **said, "logprobs": logprobs, "finish_reason": finish, "uncertainty": _uncertainty(made)}
        )
    # Texts drawn for one prompt share it.
    read = sum(made["prompt_tokens"] for made in generations[:: body.n or 1])
    written = sum(len(made["token_ids"]) for made in generations)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": name,
        "seed": config.seed,
        "choices": choices,
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def models(name: str, created: int) -> dict[str, Any]:
    """The run as the one model of a list."""
    return {"object": "list", "data": [{"id": name, "object": "model", "created": created, "owned_by": "loracurve"}]}


def _uncertainty(made: dict[str, Any]) -> dict[str, Any]:
    """Means over the tokens, in nats, and the same of each token."""
    tokens = {name: made[name] for name in ("entropy", "expected_entropy", "mutual_information")}
    return {name: round(sum(of) / len(of), 6) for name, of in tokens.items()} | {"tokens": tokens}


def _named(token: str, log_prob: float) -> dict[str, Any]:
    return {"token": token, "logprob": log_prob, "bytes": list(token.encode())}


def _of_chat(made: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    others = made["alternatives"] or [[] for _ in made["tokens"]]
    content = [
        _named(token, log_prob) | {"top_logprobs": [_named(tokenizer.decode([i]), value) for i, value in top]}
        for token, log_prob, top in zip(made["tokens"], made["log_probs"], others, strict=True)
    ]
    return {"content": content, "refusal": None}


def _of_completion(made: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    starts, position = [], 0
    for token in made["tokens"]:
        starts.append(min(position, len(made["text"])))
        position += len(token)
    top = [{tokenizer.decode([i]): value for i, value in reversed(of)} for of in made["alternatives"]]
    return {
        "tokens": made["tokens"],
        "token_logprobs": made["log_probs"],
        "top_logprobs": top or None,
        "text_offset": starts,
    }
