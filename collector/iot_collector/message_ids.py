"""De-duplication by an id that devices put into their messages (IOT_MESSAGE_ID_KEY).

For brokers that send a message again with another packet id, as AWS IoT Core does, and for devices
that publish a message again. The id is the value of a key in the JSON payload, or of the MQTT 5
user property with that name, which takes precedence. It is read where the fields of the payload are
parsed.
"""

from collections.abc import Mapping, Sequence

import orjson
import psycopg2.extensions

from .binary_payloads import Decoder, fields_of_binary
from .buffer import ReadBatch
from .fields import documents_of, fields_of, fields_of_all

# Seconds. An id is kept as long as the broker may send its message again: until the session
# expires, plus a margin for the time from COMMIT to the end of the connection. It is kept at least
# as long as with the default session expiry, for devices that publish a message again. With a
# replay queue, it is also kept at least as long as the queue keeps copies.
_MARGIN = 86400
_MIN_AGE = 8 * 86400
_MIN_AGE_WITH_REPLAY = 15 * 86400
_NEVER = 0xFFFFFFFF  # a session that does not expire (MQTT 5 §3.1.2.11.2)
_MAX_LENGTH = 255


def valid_id(value: object) -> str | None:
    """Return the id of a message as text; None unless it is a string or integer.

    The text must have 1 to 255 characters and no NUL.
    """
    text = str(value) if type(value) in (str, int) else ""  # neither True nor 1.0
    return text if 0 < len(text) <= _MAX_LENGTH and "\0" not in text else None


def fields_and_ids(
    payloads: list[bytes], key: str | None, decoders: Mapping[int, Decoder]
) -> tuple[Sequence[bytes | None], list[str | None] | None]:
    """Return the fields of each payload, and the id under ``key`` of each; without a key, no ids.

    :param decoders: index of a payload -> its decoder, for the binary payloads.
    """
    if not decoders:
        return _fields_and_ids_of_text(payloads, key)
    text = [payload for index, payload in enumerate(payloads) if index not in decoders]
    found, ids = _fields_and_ids_of_text(text, key)
    fields = list(found)
    for index in sorted(decoders):
        fields.insert(index, fields_of_binary(payloads[index], decoders[index]))
        if ids is not None:
            ids.insert(index, _id_of(fields[index], key))
    return fields, ids


def _fields_and_ids_of_text(
    payloads: list[bytes], key: str | None
) -> tuple[Sequence[bytes | None], list[str | None] | None]:
    if key is None:
        return fields_of_all(payloads), None
    if (documents := documents_of(payloads)) is not None:
        return payloads, [_id_in(document, key) for document in documents]
    return [fields_of(payload) for payload in payloads], [_id_of(p, key) for p in payloads]


def _id_of(text: bytes | None, key: str | None) -> str | None:
    try:
        return _id_in(orjson.loads(text or b""), key)
    except orjson.JSONDecodeError:
        return None


def _id_in(document: object, key: str | None) -> str | None:
    return valid_id(document.get(key)) if isinstance(document, dict) else None


def drop_known(cursor: psycopg2.extensions.cursor, batch: list[ReadBatch]) -> list[ReadBatch]:
    """Insert the ids of the messages; return the messages whose id was new or that have no id."""
    ids = [i for read in batch for i in read.ids or ()]
    # Sorted, so that two collectors that insert the same ids do not deadlock.
    wanted = sorted({i for i in ids if i is not None})
    cursor.execute(
        "INSERT INTO message_ids (id) SELECT unnest(%s::text[])"
        " ON CONFLICT DO NOTHING RETURNING id",
        (wanted,),
    )
    new = {i for (i,) in cursor.fetchall()}
    if len(new) == len(ids):
        return batch
    return [_new_messages(read, new) for read in batch]


def _new_messages(read: ReadBatch, new: set[str]) -> ReadBatch:
    """Return the messages of a read that have a new id or no id; remove their ids from ``new``."""
    kept = []
    for index, i in enumerate(read.ids or ()):
        if i is None or i in new:
            new.discard(i or "")  # the next message with this id is a duplicate
            kept.append(index)
    return read.select(kept)


def forget_old(
    cursor: psycopg2.extensions.cursor, session_expiry: int, *, replay: bool = False
) -> None:
    """Delete the ids of messages that cannot be sent again any more.

    :param session_expiry: IOT_MQTT_SESSION_EXPIRY_SECONDS.
    :param replay: whether there is a replay queue.
    """
    min_age = _MIN_AGE_WITH_REPLAY if replay else _MIN_AGE
    if session_expiry == _NEVER:
        return
    cursor.execute(
        "DELETE FROM message_ids WHERE stored_at < now() - make_interval(secs => %s)",
        (max(session_expiry + _MARGIN, min_age),),
    )
