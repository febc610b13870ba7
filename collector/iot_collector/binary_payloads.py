"""Converts CBOR and MessagePack payloads to JSON, for the column ``fields``.

The MQTT 5 content type of a message gives the format of its payload, or the settings give it for
the message's topic. A value that JSON does not have becomes the closest JSON value, for CBOR as
RFC 8949 §6.1 advises: a byte string becomes base64url, NaN and infinity become null, and keys
become strings.
"""

import base64
import io
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import cbor2
import msgpack
import orjson
from paho.mqtt.client import topic_matches_sub

from .copy_format import topic_of
from .sessions import without_share
from .settings import Settings

Decoder = Callable[[bytes], object]

_MAX_SIZE = 256 << 10  # bytes; a larger payload gets no fields
_MAX_DEPTH = 128
_MAX_PREFIXES = 10_000  # entries in the cache `PrefixDecoders`
_MAX_PREFIX = 512  # bytes; a longer prefix is not cached
# The labels of SenML in CBOR (RFC 8428 §6, Table 4).
_SENML = {
    **dict(enumerate(["bs", "bv", "bu", "bt", "bn", "bver"], -6)),
    **dict(enumerate(["n", "u", "v", "vs", "vb", "s", "t", "ut", "vd"])),
}


def _refuse(_decoder: object, _immutable: object = False) -> object:
    raise ValueError("this CBOR tag is not decoded")


# These CBOR tags may decode to data exponentially larger than the payload (shared references and
# strings), take long to decode (fractions, regular expressions) or have no meaning in JSON.
_REFUSED_TAGS = dict.fromkeys((25, 28, 29, 30, 35, 36, 256, 258), _refuse)


def cbor(payload: bytes) -> object:
    """Decode a payload that is exactly one CBOR data item (RFC 8949).

    :raises Exception: the payload is anything else.
    """
    stream = io.BytesIO(payload)
    decoder = cbor2.CBORDecoder(stream, semantic_decoders=_REFUSED_TAGS, max_depth=_MAX_DEPTH)
    document = decoder.decode()
    if stream.tell() != len(payload):
        raise ValueError("the payload has more bytes after the CBOR data item")
    return document


def senml_cbor(payload: bytes) -> object:
    """Decode a SenML pack in CBOR, and replace its labels with those of SenML JSON (RFC 8428 §6).

    :raises Exception: the payload is not CBOR.
    """
    pack = cbor(payload)
    if not isinstance(pack, list):
        return pack
    return [
        {_SENML.get(label, label): value for label, value in record.items()}
        if isinstance(record, dict)
        else record
        for record in pack
    ]


def message_pack(payload: bytes) -> object:
    """Decode a payload that is exactly one MessagePack object.

    :raises Exception: the payload is anything else.
    """
    return msgpack.unpackb(payload, timestamp=3, strict_map_key=False)


def decoder_of(content_type: str) -> Decoder | None:
    """Return the decoder for an MQTT 5 content type (a media type); None if it has none."""
    name = content_type.partition(";")[0].strip().lower()
    if name in ("application/senml+cbor", "application/sensml+cbor"):
        return senml_cbor
    if name == "application/cbor" or name.endswith("+cbor"):
        return cbor
    if name.removeprefix("application/") in ("msgpack", "x-msgpack", "vnd.msgpack"):
        return message_pack
    return None


def fields_of_binary(payload: bytes, decoder: Decoder) -> bytes | None:
    """Return a binary payload as JSON text.

    :return: None if the payload is too large, cannot be decoded, is null or contains U+0000.
    """
    if len(payload) > _MAX_SIZE:
        return None
    try:
        document = decoder(payload)
        if document is None:
            return None
        text = orjson.dumps(document, _json_value, orjson.OPT_NON_STR_KEYS)
    except Exception:  # noqa: BLE001 - for arbitrary bytes, the decoders raise many exceptions
        return None
    return None if b"\\u0000" in text else text


def _json_value(value: Any) -> object:
    """Return the closest JSON value for a value that orjson cannot encode.

    :raises TypeError: there is no such value.
    """
    if isinstance(value, bytes):
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, cbor2.CBORTag):
        return value.value
    if isinstance(value, msgpack.ExtType):
        return value.data
    if isinstance(value, cbor2.frozendict):
        return dict(value)
    if value is cbor2.undefined or isinstance(value, cbor2.CBORSimpleValue):
        return None
    raise TypeError


class BinaryTopics:
    """The topics that have binary payloads according to the settings."""

    def __init__(self, settings: Settings) -> None:
        self._filters = [(without_share(f), cbor) for f in settings.cbor_topics]
        self._filters += [(without_share(f), message_pack) for f in settings.messagepack_topics]

    def __bool__(self) -> bool:
        """Whether the settings name any topics."""
        return bool(self._filters)

    def decoder_of(self, topic: bytes) -> Decoder | None:
        """Return the decoder for the payloads of a topic; None if they are not binary."""
        name = topic.decode()
        return next((decoder for f, decoder in self._filters if topic_matches_sub(f, name)), None)


class PrefixDecoders(dict[bytes, Decoder | None]):
    """Cache: prefix of a row (see `copy_format.RowPrefixes`) -> decoder for its topic, or None.

    Without it, extracting the topic from the prefix of each message takes five times as long.
    """

    def __init__(self, topics: BinaryTopics) -> None:
        super().__init__()
        self._topics = topics

    def __missing__(self, prefix: bytes) -> Decoder | None:
        """Find the decoder for a prefix."""
        decoder = self._topics.decoder_of(topic_of(prefix))
        if len(prefix) <= _MAX_PREFIX:
            if len(self) >= _MAX_PREFIXES:
                self.clear()
            self[prefix] = decoder
        return decoder
