"""What stands before the application: the token, the size and pace of bodies, and the counters of requests.

Plain ASGI, so that a body is never held in full before its limits are known.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from loracurve.serving.config import ServeConfig, is_loopback
from loracurve.serving.failure import failure_of

__all__ = ["OPEN", "Guard"]


Message = MutableMapping[str, Any]

Receive = Callable[[], Awaitable[Message]]

Send = Callable[[Message], Awaitable[None]]

Application = Callable[[Message, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

OPEN = ("/", "/docs", "/openapi.json", "/health")
"""Paths that need no token: they say nothing of the run."""

# A body beyond the limit is read and dropped up to this many times the limit: clients that send all of it before they
# read would else see a broken connection in place of the answer.
DRAINED = 8


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """Wraps an application.

    Args:
        app: gets only requests whose body is complete and within the limits.
        options: the limits.
        token: what clients must send, if anything.
        finished: told path, status and seconds of each request.
    """

    def __init__(
        self,
        app: Application,
        options: ServeConfig,
        token: str | None = None,
        finished: Callable[[str, int, float], None] = lambda path, status, seconds: None,
    ) -> None:
        self.app, self.options, self.token, self.finished = app, options, token, finished

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request, or hand on what is none (start and end of the server)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = _headers(scope["headers"])
            self._check_head(scope, headers)
            if scope["method"] == "POST":
                receive = await self._read(headers, receive)
            await self.app(scope, receive, watched)
        except _Refused as refused:
            await _answer(watched, scope["path"], refused.status, str(refused))
        except ConnectionError:
            status = 499  # the client has gone
        except Exception:
            logger.exception("%r failed", scope["path"])
            if not status:
                await _answer(watched, scope["path"], 500, "a fault of the server; its log says more")
            status = 500
        finally:
            self.finished(scope["path"], status or 499, time.perf_counter() - started)

    def _check_head(self, scope: Message, headers: dict[bytes, bytes]) -> None:
        if self.token is None:
            # A page elsewhere can point its own name at this machine and so read what only this machine may.
            name = headers.get(b"host", b"").decode("latin-1")
            name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
            if name.lower() != self.options.host.lower() and not is_loopback(name):
                raise _Refused(421, f"expected this machine as the host, found {name[:80]!r}; or start with a token")
        elif scope["path"] not in OPEN:
            scheme, _, sent = headers.get(b"authorization", b"").strip().partition(b" ")
            right = hmac.compare_digest(sent.strip(), self.token.encode())
            if not right or scheme.lower() != b"bearer":
                raise _Refused(401, "expected the header 'Authorization: Bearer TOKEN' with this server's token")
        if scope["method"] == "POST":
            kind, *parameters = headers.get(b"content-type", b"").lower().decode("latin-1").split(";")
            if kind.strip() != "application/json":
                raise _Refused(415, f"expected the content type application/json, found {kind.strip()[:80]!r}")
            for name, _, value in (parameter.partition("=") for parameter in parameters):
                if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8", "us-ascii"):
                    raise _Refused(415, f"expected JSON in UTF-8, found the charset {value.strip()[:80]!r}")
            encoding = headers.get(b"content-encoding", b"identity").strip().lower().decode("latin-1")
            if encoding != "identity":
                raise _Refused(415, f"expected a body as it is, found it encoded by {encoding[:80]!r}")

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """The whole body, within its limits, as something that can be received again."""
        most = self.options.max_body_bytes
        declared = headers.get(b"content-length", b"0")
        too_large = f"expected a body of at most {most} bytes, found more; send several requests"
        if int(declared) > DRAINED * most:
            raise _Refused(413, too_large)
        body, size, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(self.options.read_timeout_s):
                while more and size <= DRAINED * most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    part = message.get("body", b"")
                    size, more = size + len(part), message.get("more_body", False)
                    if size > most:
                        body.clear()
                    else:
                        body += part
        except TimeoutError:
            raise _Refused(
                408, f"expected the whole body within {self.options.read_timeout_s:g} s, found less"
            ) from None
        if size > most:
            raise _Refused(413, too_large)
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def again() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        return again


# Two of them would be read as one thing here and as another behind this.
SINGLE = (b"authorization", b"content-encoding", b"content-length", b"content-type", b"host")


def _headers(sent: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Headers by their names in lower case; refuses two of what may stand once."""
    found: dict[bytes, bytes] = {}
    for name, value in sent:
        name = name.lower()
        if name in SINGLE and name in found:
            raise _Refused(400, f"expected one header {name.decode()}, found several")
        found[name] = value
    return found


async def _answer(send: Send, path: str, status: int, message: str) -> None:
    """A JSON error; the connection is closed behind it, because its body may not have been read."""
    status, failure = failure_of(path, status, message)
    body = json.dumps(failure).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    head.append((b"connection", b"close"))
    if status == 401:
        head.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
