"""Serving a run over HTTP until the process is stopped."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from loracurve.runs.run import open_run
from loracurve.serving.config import ServeConfig
from loracurve.system.errors import UserError

__all__ = ["serve_run"]


def serve_run(options: ServeConfig, run: str, points: int | None = None, base: str | None = None) -> None:
    """Listen, open the run (`base` as `open_run` takes it), and answer requests; what cannot be listened on is known
    before the run is loaded.

    Raises:
        UserError: the packages of the extra `serve` are missing, no such token file, an address that is taken.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise UserError(
            f"serve: expected the package {error.name}, found none; pip install 'loracurve[serve]'"
        ) from error
    from loracurve.serving.app import make_app
    from loracurve.serving.http_protocol import ImpatientProtocol

    token = None if options.token_file is None else _read_token(Path(options.token_file))
    listener = _bind(options.host, options.port)
    with listener:
        opened = open_run(run, base=base)
        evaluation = opened.config.evaluation if points is None else replace(opened.config.evaluation, points=points)
        app: Any = make_app(opened, options, evaluation, token)
        gc.collect()
        gc.freeze()  # looking through all that was loaded for garbage would hold up a request now and then
        protocol: Any = partial(ImpatientProtocol, options.read_timeout_s)
        settings = uvicorn.Config(
            app,
            http=protocol,
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=options.max_connections,
            timeout_graceful_shutdown=int(options.timeout_s) + 1,
        )
        listener.listen(options.max_connections)
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"Serving {run} on http://{host}:{listener.getsockname()[1]} (stop it by Ctrl-C)", flush=True)

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                if self.should_exit and sig == signal.SIGINT:  # once more: nobody waits for open requests
                    os._exit(130)
                super().handle_exit(sig, frame)

        server = Server(settings)
        with _ending_well(lambda: server.started):
            server.run(sockets=[listener])


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"token_file: expected a text file with a token, found {path} ({error})") from error
    if len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"token_file: expected 8 or more ASCII characters without blanks, found others in {path}")
    return token


def _bind(host: str, port: int) -> socket.socket:
    """A socket at an address, before the run is loaded: what cannot be served is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port") from error
    return listener


@contextmanager
def _ending_well(started: Callable[[], bool]) -> Iterator[None]:
    """SIGTERM and SIGINT, which uvicorn sends itself again when it has shut down, end the command with code 0."""

    def ignored(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not started():
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ignored) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
