"""The database password in AWS Secrets Manager (``IOT_DATABASE_PASSWORD_SECRET``).

It is read at the first connection and kept while the database accepts it, so that reconnects do
not depend on AWS. When the database refuses it, it is read again: that is how a rotation reaches
the collector without a restart, whichever of database and secret is changed first.
"""

import json
import time

from . import aws

# Seconds between two reads of a secret: a database that refuses every login costs few calls.
_PAUSE = 2.0

_passwords: dict[str, tuple[str, float]] = {}  # by secret: the password, and when it was read


def password(secret: str, refused: str | None = None) -> str:
    """Return the password, from memory where it is known.

    :param secret: ARN or name of the secret. Its text is the password, or a JSON object with the
        key ``password``, which is how RDS writes it.
    :param refused: a password that the database has just refused: read the secret again if that
        is the one in memory, and not read in the last two seconds.
    :raises aws.AwsError: it cannot be read; the text has nothing of the secret's content.
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
        # As in files: a line break at the end is nobody's password.
        return str(text).rstrip("\r\n")
    value = document.get("password")
    if not isinstance(value, str):
        raise aws.AwsError(f"{secret} is a JSON object whose key password is missing or no text")
    return value
