"""The load generator, a separate process: ``python -m benchmarks.load --port 31001 …``.

It builds packets itself (about 2 µs per message), because it shares two cores with the measured
programs. With a rate, the payload of a message has the time when it was *due*, so that a late
generator or broker shows as delay. The last line of its output is a JSON object with its results.
"""

import argparse
import json
import selectors
import socket
import time
from dataclasses import dataclass

from . import wire

_CHUNK = 64  # messages per write at full speed
_WINDOW = 4_000  # messages of one connection that the broker may still have to acknowledge
_PUBACK_SIZE = 4
_PATIENCE = 120.0


@dataclass(slots=True)
class Device:
    """One connection. The messages of a device are numbered without gaps."""

    number: int
    sock: socket.socket
    sent: int = 0
    acknowledged_bytes: int = 0
    unsent: bytes = b""

    @property
    def outstanding(self) -> int:
        """The number of messages that the broker has not acknowledged."""
        return self.sent - self.acknowledged_bytes // _PUBACK_SIZE

    def fill(self, count: int, sent_us: list[int]) -> None:
        """Append ``count`` messages to the unsent data."""
        packets = [self.unsent]
        for i in range(count):
            sequence = self.sent + i
            message = wire.payload(self.number, sequence, sent_us[i])
            packets.append(wire.publish(sequence % 65_535 + 1, message))
        self.unsent = b"".join(packets)
        self.sent += count

    def flush(self) -> None:
        """Send as much as the socket accepts."""
        if self.unsent:
            try:
                self.unsent = self.unsent[self.sock.send(self.unsent) :]
            except BlockingIOError:
                return

    def receive(self) -> None:
        """Count acknowledgements."""
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise OSError("broker closed the connection")
        self.acknowledged_bytes += len(data)


def flood(devices: list[Device], count: int | None, seconds: float) -> None:
    """Publish as fast as the broker accepts, until ``count`` messages or ``seconds``."""
    selector = selectors.DefaultSelector()
    device: Device
    for device in devices:
        selector.register(device.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, device)
    end = time.monotonic() + seconds
    share = [(count + i) // len(devices) if count else None for i in range(len(devices))]
    open_devices = set(range(len(devices)))
    while open_devices and time.monotonic() < end:
        for key, mask in selector.select(0.1):
            device = key.data
            if mask & selectors.EVENT_READ:
                device.receive()
            if mask & selectors.EVENT_WRITE:
                limit = share[device.number - 1]
                room = _CHUNK if limit is None else min(_CHUNK, limit - device.sent)
                if not device.unsent and room and device.outstanding < _WINDOW:
                    device.fill(room, [time.time_ns() // 1000] * room)
                device.flush()
                done = limit is not None and device.sent >= limit and not device.unsent
                waiting = device.outstanding >= _WINDOW and not device.unsent
                if done:
                    open_devices.discard(device.number - 1)
                if done or waiting:
                    selector.modify(device.sock, selectors.EVENT_READ, device)
            elif device.outstanding < _WINDOW // 2 and device.number - 1 in open_devices:
                selector.modify(device.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, device)


def pace(devices: list[Device], rate: float, seconds: float) -> float:
    """Publish each message when it is due; return the maximum lateness in seconds."""
    start = time.time()
    total = int(rate * seconds)
    latest = 0.0
    number = 0
    while number < total:
        now = time.time()
        due_count = min(total, int((now - start) * rate) + 1) - number
        if due_count <= 0:
            time.sleep(max(0.0, start + number / rate - now))
            continue
        latest = max(latest, now - (start + number / rate))
        dues: list[list[int]] = [[] for _ in devices]
        for i in range(number, number + due_count):
            dues[i % len(devices)].append(int((start + i / rate) * 1e6))
        number += due_count
        for device, due in zip(devices, dues, strict=True):
            if due:
                device.fill(len(due), due)
            device.flush()
            device.receive()
    return latest


def finish(devices: list[Device]) -> None:
    """Wait until the broker has acknowledged all messages."""
    until = time.monotonic() + _PATIENCE
    while any(device.outstanding or device.unsent for device in devices):
        if time.monotonic() > until:
            raise TimeoutError("the broker does not acknowledge all messages")
        for device in devices:
            device.flush()
            device.receive()
        time.sleep(0.001)
    for device in devices:
        device.sock.sendall(b"\xe0\0")
        device.sock.close()


def main() -> None:
    """Generate the load of the arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument(
        "--rate", type=float, help="messages per second; default: as fast as possible"
    )
    options = parser.parse_args()
    devices = []
    for number in range(1, options.connections + 1):
        sock = wire.connect(options.port, f"benchmark-device-{number}", clean=True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        devices.append(Device(number, sock))
    began = time.time()
    late = 0.0
    if options.rate:
        late = pace(devices, options.rate, options.seconds)
    else:
        flood(devices, options.count, options.seconds)
    ended = time.time()
    finish(devices)
    result = {
        "sent": [device.sent for device in devices],
        "began": began,
        "ended": ended,
        "late": late,
        "cpu": time.process_time(),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
