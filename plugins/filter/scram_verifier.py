"""The filter ``scram_verifier``: the form in which PostgreSQL stores a password.

With it, a role's password can be set without sending the password.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Callable

from ansible.errors import AnsibleFilterError

ITERATIONS = 4096  # PostgreSQL's default (scram_iterations)


def scram_verifier(password: str, salt: bytes = b"") -> str:
    """Return the SCRAM-SHA-256 verifier of a password, for ``ALTER ROLE … PASSWORD``.

    ``SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>``, as in RFC 5803 and in
    PostgreSQL's catalog pg_authid; StoredKey and ServerKey as in RFC 5802 section 3.

    :param salt: 16 random bytes if none is given.
    :raises AnsibleFilterError: the password is empty or has characters outside printable ASCII,
        which would need SASLprep (RFC 4013).
    """
    if not password or not password.isascii() or not password.isprintable():
        raise AnsibleFilterError(
            "a database password is empty or has characters that are not printable ASCII: "
            "choose another one"
        )
    salt = salt or os.urandom(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    text = [base64.b64encode(part).decode() for part in (salt, stored, server)]
    return f"SCRAM-SHA-256${ITERATIONS}:{text[0]}${text[1]}:{text[2]}"


class FilterModule:
    """The filter ``scram_verifier``."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Return the filter by name."""
        return {"scram_verifier": scram_verifier}
