"""The command `serve`, which `cli.py` offers."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loracurve.system.errors import UserError


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
