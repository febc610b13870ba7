"""The filter ``collectors_needed``: the number of collectors for a message rate on IoT Core."""

from __future__ import annotations

import math
from collections.abc import Callable

from ansible.errors import AnsibleFilterError

# PUBLISH packets per second that IoT Core sends on one connection ("Outbound publish requests per
# second per connection", not adjustable):
# https://docs.aws.amazon.com/general/latest/gr/iot-core.html#message-broker-limits
MESSAGES_PER_CONNECTION = 100
# The part of it that a collector uses on average. The rest is for bursts, and for the messages of
# another collector while that one restarts.
HEADROOM = 0.7


def collectors_needed(messages_per_second: float) -> int:
    """Return how many collectors, each with one connection, can receive that many messages.

    :raises AnsibleFilterError: the rate is not a positive number.
    """
    try:
        rate = float(messages_per_second)
    except (TypeError, ValueError):
        rate = math.nan
    if not (0 < rate < math.inf):
        raise AnsibleFilterError(
            f"iot_core_messages_per_second is {messages_per_second!r}, but has to be a number of "
            "messages per second above 0, for example 20"
        )
    # Rounded first: 0.7 has no exact binary representation, and 210 messages need 3 connections.
    return math.ceil(round(rate / (MESSAGES_PER_CONNECTION * HEADROOM), 9))


class FilterModule:
    """The filter ``collectors_needed``."""

    def filters(self) -> dict[str, Callable[[float], int]]:
        """Return the filter by name."""
        return {"collectors_needed": collectors_needed}
