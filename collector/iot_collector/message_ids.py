"""De-duplication by an id that the device puts into its messages.

For brokers that send again under another packet id, as AWS IoT Core does, and for devices that
publish again themselves. The id is a JSON key of the payload or an MQTT 5 user property.
"""

import contextlib

import orjson
import psycopg2.extensions

from .rows import decode

# Seconds. An id is kept as long as the broker may send its message again, which is until the
# session expires, plus a margin for the time from COMMIT to the end of the connection; and at
# least as long as with the default expiry, for devices that publish again themselves.
_MARGIN = 86400
_LEAST = 8 * 86400
_NEVER = 0xFFFFFFFF  # a session that does not expire (MQTT 5 §3.1.2.11.2)
_MAX_LENGTH = 255


def drop_known(cursor: psycopg2.extensions.cursor, rows: list[bytes], key: str) -> list[bytes]:
    """Enter the ids of tuples; return those whose ids were not known, or that have none."""
    ids = [message_id(row, key) for row in rows]
    # In one order, so that two collectors with ids in common cannot lock each other out.
    wanted = sorted({i for i in ids if i is not None})
    cursor.execute(
        "INSERT INTO message_ids (id) SELECT unnest(%s::text[])"
        " ON CONFLICT DO NOTHING RETURNING id",
        (wanted,),
    )
    new = {i for (i,) in cursor.fetchall()}
    kept = []
    for row, i in zip(rows, ids, strict=True):
        if i is None or i in new:
            new.discard(i or "")  # the next with this id is one too many
            kept.append(row)
    return kept


def forget_old(cursor: psycopg2.extensions.cursor, session_expiry: int) -> None:
    """Forget ids that are older than any message that can still be sent again.

    :param session_expiry: IOT_MQTT_SESSION_EXPIRY_SECONDS.
    """
    if session_expiry == _NEVER:
        return
    cursor.execute(
        "DELETE FROM message_ids WHERE stored_at < now() - make_interval(secs => %s)",
        (max(session_expiry + _MARGIN, _LEAST),),
    )


def message_id(row: bytes, key: str) -> str | None:
    """Return the id of a tuple: a string or number under ``key``, or None."""
    message = decode(row)
    value = None
    if named := orjson.loads(message.properties or b"{}").get("user", {}).get(key):
        value = named[0]
    elif message.payload[:1] == b"{":
        with contextlib.suppress(orjson.JSONDecodeError):
            value = orjson.loads(message.payload).get(key)
    text = str(value) if type(value) in (str, int) else ""  # True and 1.0 name nothing
    return text if 0 < len(text) <= _MAX_LENGTH and "\0" not in text else None
