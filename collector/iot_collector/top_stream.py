"""The data of `iot-collector top`, from the stream of the live page (explorer/stream.py)."""

import contextlib
import http.client
import json
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .top_text import value_text, visible

_SILENCE = 8.0  # seconds; the collector sends something every second
_WAITS = (0.3, 1.0, 2.0, 4.0)  # seconds before another attempt


class TopError(Exception):
    """The stream cannot be read; the text says why, and what to change."""


class Row(NamedTuple):
    """A topic: messages in the window, time of the last one (Unix seconds), and its content."""

    topic: str
    messages: int
    at: float
    value: str


@dataclass(frozen=True)
class Picture:
    """The latest data from the collector."""

    health: dict[str, Any] | None = None
    sample: list[Any] | None = None  # the newest one of explorer/rates.py
    offset: float = 0.0  # seconds that the collector's clock is ahead of ours
    rows: list[Row] | None = None
    window: int = 0  # seconds in which messages are counted
    matching: int = 0
    complete: bool = False
    unread: str | None = None  # why the database cannot be read
    lost: str | None = None  # why there is no stream

    def updated(self, name: str, content: Any) -> "Picture":
        """Return the picture after an event.

        :raises LookupError, TypeError, ValueError: a collector of this version sends no such event.
        """
        if name == "pipeline":
            return replace(
                self,
                health=content["health"],
                sample=content["rates"][-1] if content.get("rates") else self.sample,
                offset=content["now"] - time.time(),
            )
        if name == "database":
            return replace(self, unread=content["error"])
        if name == "flat":
            found = content["list"]
            return replace(
                self,
                rows=[
                    Row(topic, messages, at, value_text(*last))
                    for topic, messages, at, *last in found["rows"]
                ],
                window=found["window"],
                matching=max(found["matching"], len(found["rows"])),
                complete=content["complete"],
            )
        if name == "activity":  # sent instead of the requested list
            raise ValueError("the collector has another version")
        return self


class Feed:
    """The stream of a collector."""

    def __init__(self, url: str) -> None:
        self.picture = Picture()
        self._url = url
        self._viewer = secrets.token_hex(12)
        # Without a proxy that the environment names: it cannot reach our loopback address.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._number = 0

    def pictures(self, flat: dict[str, Any]) -> Iterator[Picture]:
        """Open a stream for a list (explorer/flat_list.py); return an iterator of its pictures.

        :raises TopError: the collector does not answer, or refuses; the iterator raises it, too.
        """
        view = {"viewer": self._viewer, "open": [], "flat": flat}
        request = urllib.request.Request(  # noqa: S310 - valid_url has checked the scheme
            f"{self._url}/explorer/stream",
            json.dumps(view).encode(),
            {"Content-Type": "application/json"},
        )
        with self._errors_explained():
            answer = self._opener.open(request, timeout=_SILENCE)
            if answer.headers.get_content_type() != "text/event-stream":
                raise ValueError("another program answers")
        return self._read(answer)

    def follow(self, flat: dict[str, Any], pictures: Iterator[Picture] | None = None) -> None:
        """Keep `picture` up to date in a new thread; the collector ends the previous stream.

        :param pictures: the pictures of a stream that is already open.
        """
        self._number += 1
        arguments = (self._number, flat, pictures)
        threading.Thread(target=self._follow, args=arguments, daemon=True).start()

    def _follow(
        self, number: int, flat: dict[str, Any], pictures: Iterator[Picture] | None
    ) -> None:
        failures = 0
        while number == self._number:
            try:
                for picture in pictures or self.pictures(flat):
                    if number != self._number:
                        return
                    self.picture, failures = picture, 0
            except TopError as error:
                self.picture = replace(self.picture, lost=str(error))
            pictures = None
            time.sleep(_WAITS[min(failures, len(_WAITS) - 1)])
            failures += 1

    def _read(self, answer: http.client.HTTPResponse) -> Iterator[Picture]:
        name, picture = "", replace(self.picture, lost=None, unread=None)
        with answer, self._errors_explained():
            for line in answer:
                kind, _, content = line.rstrip(b"\n").decode().partition(": ")
                if kind == "event":
                    name = content
                elif kind == "data":
                    picture = picture.updated(name, json.loads(content, parse_int=_integer))
                    yield picture

    @contextlib.contextmanager
    def _errors_explained(self) -> Iterator[None]:
        """Turn errors of the connection to the collector into a TopError."""
        try:
            yield
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error.code, error.read(1 << 16)) from None
        except (OSError, http.client.HTTPException, LookupError, TypeError, ValueError) as error:
            cause = getattr(error, "reason", error)  # of a URLError
            raise self._no_collector(getattr(cause, "strerror", None) or str(cause)) from None

    def _refusal(self, status: int, body: bytes) -> TopError:
        try:
            reason = str(json.loads(body)["error"])
        except (LookupError, TypeError, ValueError):
            return self._no_collector(f"HTTP status {status}")
        fix = ""
        if reason.endswith("IOT_LIVE_PAGE") or "IOT_LIVE_PAGE=" in reason:
            fix = "; set IOT_LIVE_PAGE=full for it and restart it, see docs/explorer.md"
        return TopError(
            f"the collector at {self._url} refuses the request: {visible(reason[:500])}{fix}"
        )

    def _no_collector(self, reason: str) -> TopError:
        return TopError(
            f"no collector answers at {self._url} ({visible(reason[:200])}); start it, or give its "
            "address with --url: IOT_HTTP_HOST and IOT_HTTP_PORT in its settings"
        )


def _integer(digits: str) -> int | float:
    # Devices may send numbers with more digits than Python converts to int.
    return int(digits) if len(digits) < 20 else float(digits)
