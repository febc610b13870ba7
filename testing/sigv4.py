"""The server side of AWS Signature Version 4, written after the AWS documentation.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
It shares no code with botocore. collector/tests/test_iot_core.py compares it with signatures that
AWS has published.
"""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from urllib.parse import quote, unquote

ALGORITHM = "AWS4-HMAC-SHA256"
EMPTY = hashlib.sha256(b"").hexdigest()  # of a request without a body


class RefusedError(Exception):
    """The signature of the request is wrong."""


class Secret(NamedTuple):
    """What AWS knows about an access key."""

    key: str
    token: str | None = None


def _encoded(text: str) -> str:
    return quote(text, safe="-_.~")


def signature(
    secret: str,
    scope: str,
    date: str,
    path: str,
    query: Sequence[tuple[str, str]],
    headers: Mapping[str, str],
    payload_hash: str = EMPTY,
) -> str:
    """Return the signature of a GET.

    :param scope: ``<day>/<region>/<service>/aws4_request``.
    :param date: as in X-Amz-Date.
    :param headers: the signed ones, their names in lower case.
    """
    request = [
        "GET",
        quote(path, safe="/-_.~"),
        "&".join(sorted(f"{_encoded(name)}={_encoded(value)}" for name, value in query)),
        *(f"{name}:{' '.join(value.split())}" for name, value in sorted(headers.items())),
        "",
        ";".join(sorted(headers)),
        payload_hash,
    ]
    digest = hashlib.sha256("\n".join(request).encode()).hexdigest()
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.new(key, "\n".join([ALGORITHM, date, scope, digest]).encode(), "sha256").hexdigest()


def check(
    target: str,
    headers: Mapping[str, str],
    *,
    host: str,
    region: str,
    secrets: Mapping[str, Secret],
    now: datetime | None = None,
) -> None:
    """Check a request for IoT Core's WebSocket, whose session token is not signed.

    :param target: path and query, as in the request line.
    :param secrets: by access key.
    :raises RefusedError: with the reason.
    """
    path, _, raw = target.partition("?")
    pairs = [pair.partition("=") for pair in raw.split("&") if pair]
    query = {unquote(name): unquote(value) for name, _, value in pairs}
    given, token = query.pop("X-Amz-Signature", None), query.pop("X-Amz-Security-Token", None)
    if given is None or query.get("X-Amz-Algorithm") != ALGORITHM:
        raise RefusedError("not signed")
    access_key, _, scope = query["X-Amz-Credential"].partition("/")
    date = query["X-Amz-Date"]
    if scope != f"{date[:8]}/{region}/iotdevicegateway/aws4_request":
        raise RefusedError(f"signed for {scope}")
    signed_at = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    lifetime = timedelta(seconds=int(query["X-Amz-Expires"]))
    if not timedelta(minutes=-5) <= (now or datetime.now(UTC)) - signed_at <= lifetime:
        raise RefusedError(f"expired: signed at {date}")
    if headers.get("host") != host:
        raise RefusedError(f"Host is {headers.get('host')}")
    secret = secrets.get(access_key)
    if secret is None or token != secret.token:
        raise RefusedError("unknown or expired credentials")
    names = query["X-Amz-SignedHeaders"].split(";")
    signed = {name: headers.get(name, "") for name in names}
    wanted = signature(secret.key, scope, date, path, list(query.items()), signed)
    if "host" not in signed or not hmac.compare_digest(wanted, given):
        raise RefusedError("wrong signature")
