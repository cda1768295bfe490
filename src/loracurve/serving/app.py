"""The HTTP application: paths, bodies, errors. Made by `make_app` from an engine, run by `command.serve`."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from loracurve.inference.config import EvaluationConfig, GenerateConfig
from loracurve.runs.run import Run
from loracurve.serving.batcher import Batcher, Closed, Job, QueueFull
from loracurve.serving.config import ServeConfig
from loracurve.serving.engine import Engine
from loracurve.serving.failure import failure_of
from loracurve.serving.middleware import Guard
from loracurve.serving.openai_api import ChatRequest, CompletionRequest, chat_prompt, completion, decoding, models
from loracurve.serving.prometheus import Figures
from loracurve.serving.schemas import (
    Description,
    Failure,
    GenerateAnswer,
    GenerateRequest,
    Health,
    PredictAnswer,
    PredictRequest,
)
from loracurve.system.errors import UserError
from loracurve.system.version import __version__

__all__ = ["make_app"]


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "the body is not JSON"},
    401: {"description": "no token, or a wrong one"},
    408: {"description": "the body came too slowly"},
    413: {"description": "the body is too large"},
    415: {"description": "the body is of another content type than JSON"},
    422: {"description": "the body holds something else than was expected"},
    503: {"description": "too many rows wait, no answer in time, or the server stops"},
}

MOST_CHARACTERS = 500
"""Of an error, which may show what was sent."""

REFUSALS = {status: {**said, "model": Failure} for status, said in _REFUSALS.items()}


def make_app(
    run: Run, options: ServeConfig, evaluation: EvaluationConfig | None = None, token: str | None = None
) -> Guard:
    """The application of one run, ready for a server; its thread starts and ends with the server.

    Args:
        run: an opened run. Its folder is only read.
        options: the limits.
        evaluation: points and weights to average. Default: the run's own.
        token: what clients must send as a bearer token, if anything.
    """
    paths = frozenset({"/", "/docs", "/openapi.json", "/health", "/metrics", "/run", "/predict", "/generate"})
    paths |= {"/v1/completions", "/v1/chat/completions", "/v1/models"}
    name, created = run.folder.resolve().name, int(time.time())
    figures = Figures(paths, lambda: len(batcher), lambda: batcher.rows)
    engine = Engine(run, options, evaluation, figures.count, figures.together.observe)
    batcher = Batcher(engine.work, engine.weigh, options.max_queue)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(engine.warm_up)
        batcher.start()
        yield
        await asyncio.to_thread(batcher.close, options.timeout_s)

    app = FastAPI(
        title="loracurve",
        version=__version__,
        description="Predictions and texts by the average over a curve of adapters, with their uncertainty.",
        docs_url=None,
        redoc_url=None,
        lifespan=life,
    )
    _add_errors(app)

    @app.post("/predict", summary="Predict rows", response_model=PredictAnswer, responses=REFUSALS)
    async def predict(body: PredictRequest, request: Request) -> Response:
        """Probabilities and uncertainty of rows, as the command predict gives them."""
        rows = engine.rows(body.rows)
        return JSONResponse(await answer(request, engine.key(body.nearest), rows))

    @app.post("/generate", summary="Continue prompts", response_model=GenerateAnswer, responses=REFUSALS)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Texts by the model average, with the uncertainty of each token, as the command generate gives them."""
        asked: Any = body
        named = {f.name for f in fields(GenerateConfig)} - {"batch_size"}
        values = {name: getattr(asked, name) for name in named}
        if "max_new_tokens" not in asked.model_fields_set:
            values["max_new_tokens"] = min(values["max_new_tokens"], options.max_new_tokens)
        config = GenerateConfig(**values)
        prompts = engine.prompts(asked.prompts, config)
        return JSONResponse(await answer(request, config, prompts))

    @app.post("/v1/completions", summary="Continue texts, for OpenAI's clients", responses=REFUSALS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """As OpenAI's API, without streams and stops; each choice has its uncertainty."""
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        return await complete(body, prompts, request)

    @app.post("/v1/chat/completions", summary="Continue a conversation, for OpenAI's clients", responses=REFUSALS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """As OpenAI's API, by the tokenizer's chat template, without streams, stops and tools."""
        engine.check_generates()
        return await complete(body, [chat_prompt(run.task.tokenizer, body.messages)], request)

    @app.get("/v1/models", summary="The run, for OpenAI's clients")
    async def listed() -> Response:
        """A list of one model, the run."""
        return JSONResponse(models(name, created))

    @app.get("/health", summary="Whether the server runs", response_model=Health)
    async def health() -> Response:
        """Needs no token."""
        return JSONResponse({"status": "ok"})

    @app.get("/run", summary="What the run can do", response_model=Description)
    async def described() -> Response:
        """Kind and example of the rows, classes, points, limits."""
        return JSONResponse(engine.describe())

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def metrics() -> Response:
        """Requests, errors, latency, requests that ran together, queue length, tokens."""
        return Response(figures.text(), media_type=figures.content_type)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _html(_read("page.html"))

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> Response:
        return _html(documentation_text())

    @cache
    def documentation_text() -> str:
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(_read("docs.html")).render(api=app.openapi())

    async def complete(body: CompletionRequest | ChatRequest, prompts: Sequence[str], request: Request) -> Response:
        """One text for each prompt, or `n` of them, each with a stream of draws of its own."""
        config = decoding(body, name, options.max_new_tokens)
        engine.check_count(len(prompts) * (body.n or 1), "prompts times n")
        made = await answer(request, config, engine.prompts([p for p in prompts for _ in range(body.n or 1)], config))
        return JSONResponse(completion(body, name, config, run.task.tokenizer, made["generations"]))

    async def answer(request: Request, key: Hashable, work: Sequence[Any]) -> dict[str, Any]:
        """Queue a job and wait for what comes first: its answer, the client's leaving, or the end of its time."""
        job = Job(key, work, len(work), time.monotonic() + options.timeout_s)
        try:
            batcher.submit(job)
        except QueueFull as full:
            said = f"expected at most {options.max_queue} waiting rows, found more; try again in {full.retry_s} s"
            raise HTTPException(503, said, {"Retry-After": str(full.retry_s)}) from None
        except Closed:
            raise HTTPException(503, "the server stops") from None
        future, gone = asyncio.wrap_future(job.future), asyncio.ensure_future(_left(request))
        first = min(options.max_wait_s, options.timeout_s)
        try:
            await asyncio.wait({future, gone}, timeout=first, return_when=asyncio.FIRST_COMPLETED)
            if job.started and first < options.timeout_s:
                left = options.timeout_s - first
                await asyncio.wait({future, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                done: dict[str, Any] = future.result()
                return done
        except Closed:
            raise HTTPException(503, "the server stops") from None
        finally:
            left_us = gone.done()
            gone.cancel()
            future.cancel()  # and with it the job, where nobody waits for it any more
        if left_us:
            raise ConnectionResetError
        if not job.started:
            retry_s = batcher.wait_s
            said = f"not begun within {first:g} s, because others wait too; try again in {retry_s} s"
            raise HTTPException(503, said, {"Retry-After": str(retry_s)})
        raise HTTPException(503, f"no answer within {options.timeout_s:g} s; ask for less, or try again later")

    return Guard(app, options, token, figures.finished)


async def _left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_errors(app: FastAPI) -> None:
    """Every error is JSON with one line."""

    @app.exception_handler(UserError)
    async def wrong(request: Request, error: UserError) -> Response:
        return _failure(request, 422, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", first["msg"])
            return _failure(request, 400, f"expected a JSON body, found broken JSON ({reason})")
        return _failure(request, 422, _said(first["loc"], first["msg"]))

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        told = {
            400: "expected a JSON body, found one that cannot be read",
            404: "expected a path of this server, found another; /docs lists them",
        }
        return _failure(request, error.status_code, told.get(error.status_code, str(error.detail)), error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _failure(request, 500, "a fault of the server; its log says more")  # the guard logs it


def _said(where: Sequence[Any], message: str) -> str:
    place = ".".join(str(part) for part in where if part != "body") or "body"
    return f"{place[:200]}: {message}"


def _failure(request: Request, status: int, message: str, headers: Any = None) -> Response:
    status, body = failure_of(request.url.path, status, " ".join(message.split())[:MOST_CHARACTERS])
    return JSONResponse(body, status, headers)


@cache
def _read(name: str) -> str:
    return files("loracurve.serving").joinpath(name).read_text(encoding="utf-8")


def _html(text: str) -> Response:
    """A page that may load nothing but this server's answers, and run only its own script."""
    return HTMLResponse(text, headers={"Content-Security-Policy": _policy(text)})


@cache
def _policy(text: str) -> str:
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{h}'" for h in hashes) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; script-src {allowed}; base-uri 'none'"
    return f"{policy}; frame-ancestors 'none'"
