"""A TCP proxy that fails in the ways that networks do."""

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal

HOST = "127.0.0.1"
_TICK = 0.02  # seconds within which a change of mode is noticed

# drop: bytes are read and discarded; stuck: bytes are not read; lose: bytes are discarded and the
# connection is reset.
Mode = Literal["pass", "drop", "stuck", "lose"]
Way = Literal["up", "down"]


class Wire:
    """One connection through a `Proxy`, two threads."""

    def __init__(self, proxy: "Proxy", client: socket.socket, service: socket.socket) -> None:
        self._proxy = proxy
        self._sockets = (client, service)
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._running = 2
        self.up: Mode | None = None  # the mode of this connection; None: that of the proxy
        self.down: Mode | None = None
        for sock in self._sockets:
            sock.setblocking(False)
        ways = ((client, service, "up"), (service, client, "down"))
        self._threads = [threading.Thread(target=self._run, args=w, daemon=True) for w in ways]
        for thread in self._threads:
            thread.start()

    def cut(self) -> None:
        """Reset the connection on both sides. Data in transit is lost."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._end.set()

    def join(self) -> None:
        """Wait until a connection that was reset has ended."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(10)

    def _run(self, source: socket.socket, target: socket.socket, way: Way) -> None:
        try:
            with contextlib.suppress(OSError):
                self._pump(source, target, way)
        finally:
            with self._lock:
                self._running -= 1
                last = not self._running
            if last:
                for sock in self._sockets:
                    sock.close()
            elif not self._end.is_set():
                with contextlib.suppress(OSError):
                    target.shutdown(socket.SHUT_WR)

    def _mode(self, way: Way) -> Mode:
        mode: Mode = getattr(self, way) or getattr(self._proxy, way)
        return mode

    def _pump(self, source: socket.socket, target: socket.socket, way: Way) -> None:
        while not self._end.is_set():
            if self._mode(way) == "stuck":
                self._end.wait(_TICK)
                continue
            if not select.select([source], [], [], _TICK)[0]:
                continue
            rate = self._proxy.rate
            data = source.recv(max(1, int(rate * _TICK)) if rate else 1 << 16)
            if not data:
                return
            if way == "up" and self._proxy.on_up is not None:
                self._proxy.on_up(self, data)
            mode = self._mode(way)
            if mode == "lose":
                self.cut()
            while mode in ("pass", "stuck") and data and not self._end.is_set():
                if select.select([], [target], [], _TICK)[1]:
                    data = data[target.send(data) :]
            if rate:
                self._end.wait(_TICK)


class Proxy:
    """A port that leads to another one. ``up`` is towards the service, ``down`` back.

    :param port: of the service, on 127.0.0.1.
    """

    def __init__(self, port: int) -> None:
        self.service = (HOST, port)  # for new connections
        self._server = socket.create_server((HOST, 0))
        self._server.settimeout(_TICK)
        self._closed = threading.Event()
        self._wires: list[Wire] = []
        self.port: int = self._server.getsockname()[1]
        self.up: Mode = "pass"
        self.down: Mode = "pass"
        self.refusing = False  # new connections are closed at once
        self.rate: float | None = None  # bytes per second in each direction
        # Called with bytes to the service before they are sent, in the thread of the connection.
        self.on_up: Callable[[Wire, bytes], None] | None = None
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Reset every connection. New ones work."""
        wires, self._wires = self._wires, []
        for wire in wires:
            wire.cut()
        for wire in wires:
            wire.join()

    def close(self) -> None:
        """End everything."""
        self._closed.set()
        self._thread.join(10)
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(OSError):  # TimeoutError included: no new connection
                client, _ = self._server.accept()
                if self.refusing:
                    client.close()
                    continue
                try:
                    service = socket.create_connection(self.service, timeout=5)
                except OSError:
                    client.close()
                    continue
                self._wires.append(Wire(self, client, service))
