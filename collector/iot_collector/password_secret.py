"""The database password in AWS Secrets Manager (``IOT_DATABASE_PASSWORD_SECRET``).

It is read at the first connection and kept while the database accepts it, so that reconnects do
not depend on AWS. When the database refuses it, it is read again. So a rotation needs no restart of
the collector, and either the database or the secret may be changed first.
"""

import json
import time

from . import aws

# Seconds between two reads of a secret. It limits the calls if the database refuses every login.
_PAUSE = 2.0

_passwords: dict[str, tuple[str, float]] = {}  # by secret: the password, and when it was read


def password(secret: str, refused: str | None = None) -> str:
    """Return the password, from memory if it was read before.

    :param secret: ARN or name of the secret. Its text is the password, or a JSON object with the
        key ``password``, as RDS writes it.
    :param refused: a password that the database has just refused. If it is the one in memory, the
        secret is read again, unless it was read in the last two seconds.
    :raises aws.AwsError: the secret cannot be read. The text has nothing of the secret's content.
    """
    known, read_at = _passwords.get(secret, (None, 0.0))
    if known is not None and (known != refused or time.monotonic() - read_at < _PAUSE):
        return known
    value = _read(secret)
    _passwords[secret] = value, time.monotonic()
    return value


def _read(secret: str) -> str:
    region = secret.split(":")[3] if secret.startswith("arn:") else None
    with aws.explained("secretsmanager:GetSecretValue", secret):
        answer = aws.client("secretsmanager", region).get_secret_value(SecretId=secret)
    text = answer.get("SecretString")
    if text is None:
        raise aws.AwsError(f"{secret} is binary; store the password as text, or as RDS does")
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        # A line break at the end is not part of the password, as in a password file.
        return str(text).rstrip("\r\n")
    value = document.get("password")
    if not isinstance(value, str):
        raise aws.AwsError(f"{secret} is a JSON object, but its key password is missing or no text")
    return value
