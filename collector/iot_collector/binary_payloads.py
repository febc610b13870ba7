"""CBOR and MessagePack as JSON, for the column ``fields``.

A message says what its payload is with an MQTT 5 content type, or the settings do with its topic.
Whatever JSON does not have is turned into what is closest to it, for CBOR as RFC 8949 §6.1 advises:
byte strings into base64url, NaN and infinity into null, keys into text.
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

_MAX_SIZE = 256 << 10  # bytes; what is larger stays raw
_MAX_DEPTH = 128
_MAX_PREFIXES = 10_000  # whose decoder is remembered
_MAX_PREFIX = 512  # bytes; longer ones are not remembered
# The labels of SenML in CBOR (RFC 8428 §6, Table 4).
_SENML = {
    **dict(enumerate(["bs", "bv", "bu", "bt", "bn", "bver"], -6)),
    **dict(enumerate(["n", "u", "v", "vs", "vb", "s", "t", "ut", "vd"])),
}


def _refuse(_decoder: object, _immutable: object = False) -> object:
    raise ValueError("a tag that is not decoded")


# What these tags of CBOR decode to may be exponentially larger than the payload (shared references
# and strings), take long (fractions, regular expressions) or mean nothing in JSON.
_REFUSED_TAGS = dict.fromkeys((25, 28, 29, 30, 35, 36, 256, 258), _refuse)


def cbor(payload: bytes) -> object:
    """Decode one CBOR data item that is all of the payload (RFC 8949).

    :raises Exception: it is not.
    """
    stream = io.BytesIO(payload)
    decoder = cbor2.CBORDecoder(stream, semantic_decoders=_REFUSED_TAGS, max_depth=_MAX_DEPTH)
    document = decoder.decode()
    if stream.tell() != len(payload):
        raise ValueError("there is more after the data item")
    return document


def senml_cbor(payload: bytes) -> object:
    """Decode a SenML pack in CBOR, with the labels that it has in JSON (RFC 8428 §6).

    :raises Exception: it is not CBOR.
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
    """Decode one MessagePack object that is all of the payload.

    :raises Exception: it is not.
    """
    return msgpack.unpackb(payload, timestamp=3, strict_map_key=False)


def decoder_of(content_type: str) -> Decoder | None:
    """Return the decoder for an MQTT 5 content type (a media type); None for all others."""
    name = content_type.partition(";")[0].strip().lower()
    if name in ("application/senml+cbor", "application/sensml+cbor"):
        return senml_cbor
    if name == "application/cbor" or name.endswith("+cbor"):
        return cbor
    if name.removeprefix("application/") in ("msgpack", "x-msgpack", "vnd.msgpack"):
        return message_pack
    return None


def fields_of_binary(payload: bytes, decoder: Decoder) -> bytes | None:
    """Return the JSON text of a binary payload, or None if it cannot be read as that."""
    if len(payload) > _MAX_SIZE:
        return None
    try:
        document = decoder(payload)
        if document is None:
            return None
        text = orjson.dumps(document, _json_value, orjson.OPT_NON_STR_KEYS)
    except Exception:  # noqa: BLE001 - devices send anything, and decoders raise anything
        return None
    return None if b"\\u0000" in text else text


def _json_value(value: Any) -> object:
    """Return what stands in JSON for a value that JSON does not have.

    :raises TypeError: nothing does.
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
    """Which topics have binary payloads, as the settings say."""

    def __init__(self, settings: Settings) -> None:
        self._filters = [(without_share(f), cbor) for f in settings.cbor_topics]
        self._filters += [(without_share(f), message_pack) for f in settings.messagepack_topics]

    def __bool__(self) -> bool:
        """Whether the settings name any."""
        return bool(self._filters)

    def decoder_of(self, topic: bytes) -> Decoder | None:
        """Return the decoder for the payloads of a topic; None if they are not binary."""
        name = topic.decode()
        return next((decoder for f, decoder in self._filters if topic_matches_sub(f, name)), None)


class PrefixDecoders(dict[bytes, Decoder | None]):
    """Cache: prefix of a row (see `copy_format.RowPrefixes`) -> the decoder of its topic.

    Cutting the topic out of the prefix of each message takes five times as long.
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
