"""The options of `loracurve serve`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields

from loracurve.system.errors import UserError

__all__ = ["ServeConfig", "is_loopback"]


@dataclass(frozen=True)
class ServeConfig:
    """Where a server listens and what it lets clients ask."""

    host: str = "127.0.0.1"
    """Address to listen on. Others than this machine's own (127.0.0.1, ::1, localhost) need a token."""
    port: int = 8000
    """Port to listen on; 0: a free one, which is printed."""
    token_file: str | None = None
    """File with a token that clients must send (Authorization: Bearer TOKEN)."""
    max_body_bytes: int = 1_048_576
    """Largest body of a request, in bytes."""
    max_rows: int = 256
    """Most rows or prompts in one request."""
    max_tokens_per_row: int = 4096
    """Most tokens in a row or a prompt, before it is cut to the model's window."""
    max_new_tokens: int = 256
    """Most new tokens a request may ask for, for each prompt."""
    max_queue: int = 64
    """Most requests that wait; more are refused with status 429."""
    max_connections: int = 256
    """Most connections open at the same time; more are refused with status 503."""
    timeout_s: float = 60.0
    """Seconds after which a request that has no answer yet gets status 503."""
    read_timeout_s: float = 10.0
    """Seconds a client has for sending the head of a request, for its body, and for taking more of an answer."""
    batch_wait_ms: float = 5.0
    """Milliseconds a request waits for others to run with."""
    batch_rows: int = 256
    """Most rows of several requests that are predicted together."""
    batch_prompts: int = 8
    """Prompts decoded together, each at all points."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("port", "batch_wait_ms") else 1
            if field.name in ("timeout_s", "read_timeout_s"):
                if not 0 < value < float("inf"):
                    raise UserError(f"{field.name}: expected seconds above 0, found {value}")
            elif isinstance(value, int | float) and not least <= value < float("inf"):
                raise UserError(f"{field.name}: expected at least {least}, found {value}")
        if self.port > 65535:
            raise UserError(f"port: expected a port from 0 to 65535, found {self.port}")
        if self.token_file is None and not is_loopback(self.host):
            raise UserError(
                f"host: expected this machine's own address, such as 127.0.0.1, found {self.host}, which others reach; "
                "give --token_file too"
            )


def is_loopback(host: str) -> bool:
    """Whether a host name or address (without brackets) is this machine's own and no other's."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
