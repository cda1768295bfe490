"""The options of `loracurve serve`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated

from loracurve.system.errors import UserError
from loracurve.system.ranges import Count, Positive, Range, check_ranges

__all__ = ["ServeConfig", "is_loopback"]


@dataclass(frozen=True)
class ServeConfig:
    """Where a server listens and what it lets clients ask."""

    host: str = "127.0.0.1"
    """Address to listen on. Others than this machine's own (127.0.0.1, ::1, localhost) need a token."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen on; 0: a free one, which is printed."""
    token_file: str | None = None
    """File with a token that clients must send (Authorization: Bearer TOKEN)."""
    max_body_bytes: Count = 1_048_576
    """Largest body of a request, in bytes."""
    max_rows: Count = 256
    """Most rows or prompts in one request."""
    max_tokens_per_row: Count = 4096
    """Most tokens in a row or a prompt, before it is cut to the model's window."""
    max_new_tokens: Count = 256
    """Most new tokens a request may ask for, for each prompt."""
    max_queue: Count = 1024
    """Most rows and prompts that wait; requests with more are refused with status 503 and told when to come again."""
    max_wait_s: Positive = 60.0
    """Seconds after which a request that is not being worked on yet gets status 503, and is told when to come again."""
    max_connections: Count = 256
    """Most connections open at the same time; more are refused with status 503."""
    timeout_s: Positive = 120.0
    """Seconds after which a request that has no answer yet gets status 503."""
    read_timeout_s: Positive = 10.0
    """Seconds a client has for sending the head of a request, for its body, and for taking more of an answer."""
    batch_tokens: Count = 256
    """Tokens of several requests that are predicted together, each at all points; what all prompts begin with counts
    once. A request with more runs alone."""
    batch_prompts: Count = 8
    """Prompts decoded together, each at all points."""
    nearest_rows: Annotated[int, Range(0, 2000)] = 0
    """Training rows, drawn by the hash of their ids, among which clients may ask for the nearest to theirs; they run
    once at one point when the server starts. 0: none, since whoever asks sees training texts."""

    def __post_init__(self) -> None:
        check_ranges(self)
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
