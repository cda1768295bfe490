"""Consent to run code that comes with a model: given by a person, on the command line or in Python, never by a file.

A run folder, a suite or a config may come from a stranger. What they say of `trust_remote_code` is a record.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from loracurve.system.errors import UserError

__all__ = ["FLAG", "VARIABLE", "consented", "remote_code"]

FLAG = "--trust-remote-code"

VARIABLE = "LORACURVE_TRUST_REMOTE_CODE"
"""Environment variable that says the same as the flag, to worker processes too."""


@contextmanager
def remote_code(allowed: bool) -> Iterator[None]:
    """Inside the block there is consent, if `allowed`, in this process and those that it starts."""
    before = os.environ.get(VARIABLE)
    if allowed:
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if allowed:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def consented(asked: bool, where: str, given: bool = False) -> bool:
    """Whether code that comes with a model may run.

    Args:
        asked: what a file says.
        where: the file or folder, which begins the message of the error.
        given: consent in Python.

    Raises:
        UserError: the file asks for it, and nobody has consented.
    """
    given = given or os.environ.get(VARIABLE) == "1"
    if asked and not given:
        raise UserError(
            f"{where} asks to run code that comes with its model; if you trust that code, give {FLAG} (in Python: "
            "trust_remote_code=True)"
        )
    return given
