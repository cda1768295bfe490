"""Serving a run over HTTP until the process is stopped."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
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
        listener.listen(128)
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"Serving {run} on http://{host}:{listener.getsockname()[1]} (stop it by Ctrl-C)", flush=True)
        with _ending_well():
            uvicorn.Server(settings).run(sockets=[listener])


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
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
def _ending_well() -> Iterator[None]:
    """SIGTERM and SIGINT, which uvicorn sends itself again when it has shut down, end the command with code 0."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
