"""Topic filters and shared subscriptions, ``$share/<group>/<filter>`` (MQTT 5 §4.8.2)."""

from __future__ import annotations

from collections.abc import Callable


def plain_filter(topic_filter: str) -> str:
    """Return the topic filter of a subscription, without ``$share/<group>/``."""
    return topic_filter.split("/", 2)[2] if topic_filter.startswith("$share/") else topic_filter


def shared_filter(topic_filter: str, group: str) -> str:
    """Return the filter as a shared subscription; one that is already shared stays as it is."""
    return topic_filter if topic_filter.startswith("$share/") else f"$share/{group}/{topic_filter}"


class FilterModule:
    """Filters ``plain_filter`` and ``shared_filter``."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Return the filters by name."""
        return {"plain_filter": plain_filter, "shared_filter": shared_filter}
