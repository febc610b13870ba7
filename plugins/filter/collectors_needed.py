"""How many collectors a rate of messages needs on AWS IoT Core."""

from __future__ import annotations

import math
from collections.abc import Callable

from ansible.errors import AnsibleFilterError

# PUBLISH packets that IoT Core sends on one connection in a second ("Outbound publish requests per
# second per connection", not adjustable):
# https://docs.aws.amazon.com/general/latest/gr/iot-core.html#message-broker-limits
MESSAGES_PER_CONNECTION = 100
# The part of it that is planned with: the rest is for what comes in bursts, and for what the others
# take over while one collector restarts.
HEADROOM = 0.7


def collectors_needed(messages_per_second: float) -> int:
    """Return how many collectors, each with a connection of its own, take that many messages.

    :raises AnsibleFilterError: the rate is no positive number.
    """
    try:
        rate = float(messages_per_second)
    except (TypeError, ValueError):
        rate = math.nan
    if not (0 < rate < math.inf):
        raise AnsibleFilterError(
            f"iot_core_messages_per_second is {messages_per_second!r}, and has to be a number of "
            "messages per second above 0, for example 20"
        )
    # Rounded first: 0.7 has no exact binary form, and 210 messages are for three connections.
    return math.ceil(round(rate / (MESSAGES_PER_CONNECTION * HEADROOM), 9))


class FilterModule:
    """The filter ``collectors_needed``."""

    def filters(self) -> dict[str, Callable[[float], int]]:
        """Return the filter by name."""
        return {"collectors_needed": collectors_needed}
