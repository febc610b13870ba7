"""mq-bridge, a bridge in Rust that is configured from Python.

Its COPY stores fields of a JSON payload, but not the payload, the topic or a time. So it has its
own table, which is narrower and has no indexes, and it stores less than the others.
"""

import os
import signal

from mq_bridge import Route

_INSERT = (
    "INSERT INTO bridge (device, seq, sent_us, temperature)"
    " VALUES (${payload:device}, ${payload:seq}, ${payload:sent_us}, ${payload:temperature})"
)


def main() -> None:
    """Store messages until SIGTERM."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    source = {
        "url": f"tcp://{os.environ['PEER_HOST']}:{os.environ['PEER_PORT']}",
        "topic": os.environ["PEER_TOPIC"],
        "client_id": os.environ["PEER_CLIENT"],
        "protocol": "v3",
        "qos": 1,
        "max_inflight": 10_000,
        "queue_capacity": 10_000,
    }
    sink = {
        "url": os.environ["PEER_DATABASE"],
        "table": "bridge",
        "bulk_copy": True,
        "insert_query": _INSERT,
    }
    route = {"batch_size": 5_000, "input": {"mqtt": source}, "output": {"sqlx": sink}}
    running = Route.from_config({"routes": {"bridge": route}}, "bridge")
    running.start()
    signal.sigwait(signals)
    os._exit(0)  # stopping the route would first store all its messages


if __name__ == "__main__":
    main()
