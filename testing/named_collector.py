"""``iot-collector`` that connects to a local port in place of a host name of AWS.

Usage: named_collector.py NAME PORT COMMAND.

The product has no hooks for tests; this script replaces the name resolution. OVERLAP shortens the
time that a replaced filter stays.
"""

import os
import socket
import sys
from typing import Any

from iot_collector import cli, subscriptions

NAME, PORT = sys.argv[1], int(sys.argv[2])
_connect = socket.create_connection


def create_connection(address: tuple[str, int], *args: Any, **options: Any) -> socket.socket:
    return _connect(("127.0.0.1", PORT) if address[0] == NAME else address, *args, **options)


socket.create_connection = create_connection  # type: ignore[assignment]
if overlap := os.environ.pop("OVERLAP", None):
    setattr(subscriptions, "OVERLAP", float(overlap))  # noqa: B010
sys.argv[1:] = sys.argv[3:]
cli.main()
