"""A stand-in for the endpoint of AWS IoT Core: TLS and a real Mosquitto behind it.

It checks what IoT Core checks and Mosquitto does not: signatures (sigv4.py), the rate of CONNECTs
of a client id, QoS, filters in a SUBSCRIBE, keepalive, and how many messages are un-acknowledged.
Or, with a client certificate, the ALPN protocol. It understands as much of WebSocket and MQTT as
that takes, and otherwise passes bytes on.
"""

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Self

from .certificates import Certificates
from .service import HOST, PATIENCE
from .sigv4 import RefusedError, Secret, check

NAME, REGION = "a1b2c3d4e5f6g7-ats.iot.eu-west-1.amazonaws.com", "eu-west-1"
ALPN = "x-amzn-mqtt-ca"
WINDOW, FILTERS, KEEPALIVE, RATE = 100, 8, range(30, 1201), 1.0
CONNECT, PUBLISH, PUBACK, SUBSCRIBE = 1, 3, 4, 8


def number(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """Return a Variable Byte Integer (MQTT 5 §1.5.5) and its end; -1 if bytes are missing."""
    value = 0
    for i, byte in enumerate(data[at : at + 4]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    return -1, at


class Packets:
    """The MQTT packets in a stream of WebSocket frames (RFC 6455 §5.2)."""

    def __init__(self) -> None:
        self._frames, self._mqtt = bytearray(), bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes that were read; return the packets that are now complete."""
        self._frames += data
        while self._frame():
            pass
        found: list[bytes] = []
        while True:
            length, start = number(self._mqtt, 1)
            if length < 0 or len(self._mqtt) < start + length:
                return found
            found.append(bytes(self._mqtt[: start + length]))
            del self._mqtt[: start + length]

    def _frame(self) -> bool:
        frame = self._frames
        if len(frame) < 2:
            return False
        masked, length, at = frame[1] & 0x80, frame[1] & 0x7F, 2
        if length >= 126:
            size = 2 if length == 126 else 8
            length, at = int.from_bytes(frame[at : at + size]), at + size
        end = at + (4 if masked else 0) + length
        if len(frame) < max(at, end):
            return False
        mask = frame[at : at + 4] if masked else bytes(4)
        payload = frame[end - length : end]
        if frame[0] & 0x0F in (0, 2):  # a binary or continuation frame
            self._mqtt += bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        del frame[:end]
        return True


class Endpoint:
    """The stand-in. It runs in its own thread until it is closed.

    :param port: of Mosquitto's listener behind it, a WebSocket one for ``signed``.
    :param way: ``tls`` is for a broker behind it that does all the rest itself.
    """

    def __init__(
        self,
        port: int,
        certificates: Certificates,
        way: Literal["signed", "certificate", "tls"] = "signed",
    ) -> None:
        self._service = port
        self._certificates = certificates
        self._way = way
        self.secrets: dict[str, Secret] = {}
        self.refusals: list[str] = []  # of connections
        self.violations: list[str] = []  # of a rule of IoT Core
        self.names: set[str | None] = set()  # asked for by SNI
        self.subscribes: list[int] = []  # filters in each SUBSCRIBE
        self.connects: list[float] = []  # when there was a CONNECT
        self.in_flight = self.most_in_flight = 0
        self._last_connect: dict[bytes, float] = {}
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(self._start())
        self.port: int = self._server.sockets[0].getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    def cut(self) -> None:
        """Reset all connections. Data in transit is lost."""
        self._run(self._cut())

    def _run(self, what: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(PATIENCE)

    async def _start(self) -> asyncio.Server:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._certificates.server, self._certificates.server_key)
        context.sni_callback = lambda _socket, name, _context: self.names.add(name)
        if self._way == "certificate":
            context.load_verify_locations(self._certificates.ca)
            context.verify_mode = ssl.CERT_REQUIRED
            context.set_alpn_protocols([ALPN])
        return await asyncio.start_server(self._serve, HOST, 0, ssl=context)

    async def _stop(self) -> None:
        self._server.close()
        await self._cut()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            try:
                head = await self._admit(reader, writer)
            except RefusedError as reason:
                self.refusals.append(str(reason))
                if self._way == "signed":
                    answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
                    writer.write(answer)
                    await writer.drain()
            else:
                await self._forward(head, reader, writer)
        writer.transport.abort()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """Return the bytes to send to Mosquitto first.

        :raises RefusedError: the connection is not to be served.
        """
        if self._way != "signed":
            tls = writer.get_extra_info("ssl_object")
            if self._way == "certificate" and tls.selected_alpn_protocol() != ALPN:
                raise RefusedError(f"ALPN is {tls.selected_alpn_protocol()}")
            return b""
        head = await reader.readuntil(b"\r\n\r\n")
        request, *lines = head.decode().splitlines()
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines if line)
        }
        target = request.split()[1]
        check(target, headers, host=NAME, region=REGION, secrets=self.secrets)
        return head.replace(target.encode(), b"/mqtt", 1)

    async def _forward(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        service_reader, service = await asyncio.open_connection(HOST, self._service)
        service.write(head)
        up, down, look = Packets(), Packets(), Look(self)
        both = {writer, service}
        self._open |= both
        if not head:
            ways = [self._pump(reader, service), self._pump(service_reader, writer)]
        else:
            answer = await service_reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            ways = [
                self._pump(reader, service, lambda data: look.up(up.feed(data))),
                self._pump(service_reader, writer, lambda data: look.down(down.feed(data))),
            ]
        tasks = [asyncio.ensure_future(way) for way in ways]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for end in both:
            end.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._open -= both

    @staticmethod
    async def _pump(
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        look: Callable[[bytes], None] = lambda data: None,
    ) -> None:
        while data := await source.read(1 << 16):
            look(data)
            target.write(data)
            await target.drain()


class Look:
    """The checks that IoT Core makes on one connection."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._in_flight = 0
        self._v5 = False

    def up(self, packets: list[bytes]) -> None:
        """Check the packets of the client.

        :raises ConnectionError: IoT Core would end the connection.
        """
        for packet in packets:
            kind, (_, at) = packet[0] >> 4, number(packet, 1)
            if kind == CONNECT:
                self._connect(packet, at)
            elif kind == PUBACK:
                self._in_flight -= 1
            elif kind == SUBSCRIBE:
                self._subscribe(packet, at)

    def down(self, packets: list[bytes]) -> None:
        """Check the packets of the broker."""
        self._in_flight += sum(
            packet[0] >> 4 == PUBLISH and packet[0] & 6 > 0 for packet in packets
        )
        self._endpoint.in_flight = self._in_flight
        most = max(self._endpoint.most_in_flight, self._in_flight)
        self._endpoint.most_in_flight = most
        if self._in_flight > WINDOW:
            self._violate(f"{self._in_flight} messages un-acknowledged")

    def _connect(self, packet: bytes, at: int) -> None:
        self._v5 = packet[at + 6] == 5
        keepalive, at = int.from_bytes(packet[at + 8 : at + 10]), at + 10
        if self._v5:
            length, at = number(packet, at)
            at += length
        size = int.from_bytes(packet[at : at + 2])
        client_id, now = packet[at + 2 : at + 2 + size], time.monotonic()
        self._endpoint.connects.append(now)
        last = self._endpoint._last_connect.get(client_id, now - RATE)
        self._endpoint._last_connect[client_id] = now
        if now - last < RATE:
            self._violate(f"CONNECT {now - last:.2f} s after the last one")
        if keepalive not in KEEPALIVE:
            self._violate(f"keepalive {keepalive}")

    def _subscribe(self, packet: bytes, at: int) -> None:
        at += 2
        if self._v5:
            length, at = number(packet, at)
            at += length
        filters = 0
        while at < len(packet):
            at += 2 + int.from_bytes(packet[at : at + 2])
            filters += 1
            if packet[at] & 3 > 1:
                self._violate("QoS 2")
            at += 1
        self._endpoint.subscribes.append(filters)
        if filters > FILTERS:
            self._violate(f"{filters} filters in a SUBSCRIBE")

    def _violate(self, rule: str) -> None:
        self._endpoint.violations.append(rule)
        raise ConnectionAbortedError(rule)
