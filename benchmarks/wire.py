"""The few MQTT 3.1.1 packets that the benchmark itself sends.

A library would need more CPU time per message than some competitors, on the same two cores.
"""

import socket
import struct

TOPIC = b"iot/data"
PAYLOAD_SIZE = 123
HOST = "127.0.0.1"

_PUBLISH_QOS1 = 0x32
_ACCEPTED = b"\x20\x02\x00\x00"


def payload(device: int, sequence: int, sent_us: int) -> bytes:
    """Return the JSON of a message. ``sent_us`` is its due time in Unix microseconds."""
    text = b'{"device":"device-%04d","seq":%d,"sent_us":%d,"temperature":21.57,"id":"%d-%d/' % (
        device,
        sequence,
        sent_us,
        device,
        sequence,
    )
    return text.ljust(PAYLOAD_SIZE - 2, b"x") + b'"}'


_PUBLISH_HEAD = (
    bytes((_PUBLISH_QOS1,))
    # Remaining length in two bytes: between 128 and 16 383.
    + bytes(((n := 2 + len(TOPIC) + 2 + PAYLOAD_SIZE) & 0x7F | 0x80, n >> 7))
    + struct.pack(">H", len(TOPIC))
    + TOPIC
)


def publish(packet_id: int, message: bytes) -> bytes:
    """Return a PUBLISH with QoS 1 for a message of PAYLOAD_SIZE bytes."""
    return _PUBLISH_HEAD + packet_id.to_bytes(2) + message


def _string(text: bytes) -> bytes:
    return struct.pack(">H", len(text)) + text


def connect(port: int, client_id: str, *, clean: bool) -> socket.socket:
    """Return a connected socket.

    :raises OSError: the broker is not reached or refuses.
    """
    body = _string(b"MQTT") + bytes((4, 2 if clean else 0, 0, 0)) + _string(client_id.encode())
    sock = socket.create_connection((HOST, port), timeout=10)
    sock.sendall(bytes((0x10, len(body))) + body)
    answer = _receive(sock, 4)
    if answer[:1] + answer[3:] != _ACCEPTED[:1] + _ACCEPTED[3:]:
        raise OSError(f"broker refused {client_id}: {answer.hex()}")
    return sock


def make_session(port: int, client_id: str) -> None:
    """Create a persistent session with a QoS 1 subscription, and disconnect."""
    with connect(port, client_id, clean=False) as sock:
        body = b"\0\1" + _string(TOPIC) + b"\1"
        sock.sendall(bytes((0x82, len(body))) + body)
        if _receive(sock, 5)[4] != 1:
            raise OSError("broker did not grant QoS 1")
        sock.sendall(b"\xe0\0")


def publish_one(port: int, message: bytes) -> None:
    """Publish a message; wait for its PUBACK."""
    with connect(port, "benchmark-probe", clean=True) as sock:
        sock.sendall(publish(1, message))
        _receive(sock, 4)
        sock.sendall(b"\xe0\0")


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise OSError("broker closed the connection")
        data += part
    return data
