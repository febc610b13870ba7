"""The pages over HTTP: assets, the stream of events, and requests about one topic."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from http import HTTPStatus
from importlib.resources import files
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, urlsplit
from wsgiref.types import StartResponse, WSGIEnvironment

import orjson
import pydantic

from ..settings import Settings
from . import queries
from .rates import Rates
from .reader import Reader, UnavailableError
from .stream import Stream, View
from .topics import Topics

VIEWERS = 8
_STREAMS = VIEWERS + 2  # at a time; a viewer's previous stream may end after its next one begins
_QUESTIONS = 4  # other requests at a time
THREADS = _STREAMS + _QUESTIONS  # that are busy at most
_MOST_BODY = 1 << 18

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
_JSON = "application/json"
_BUSY = "too many requests at a time; try again"
_HEADERS = [
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
]
# A chart of more than _MOST_READINGS messages has _STEPS steps, with the last _EACH messages of
# each.
_MOST_READINGS = 2_000
_STEPS = 240
_EACH = 8
_MOST_SPAN = 31 * 86400  # seconds


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class Explorer:
    """Answers `/` and everything below `/explorer/` (WSGI).

    :param report: returns the content of `/health`.
    """

    def __init__(self, settings: Settings, report: Callable[[], dict[str, Any]]) -> None:
        self._settings = settings
        self._report = report
        self._reader = Reader(settings)
        self._topics = Topics(self._reader)
        self._rates = Rates()
        self._questions = threading.BoundedSemaphore(_QUESTIONS)
        self._streams = threading.BoundedSemaphore(_STREAMS)
        self._viewers: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        self._assets = _assets()
        self.mode = settings.live_page_mode
        if self.mode == "full":
            self._rates.start()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        try:
            kind, body, *more = self._answer(environ)
            status = HTTPStatus.OK
        except _RefusedError as refusal:
            kind, status, more = _JSON, refusal.status, []
            body = orjson.dumps({"error": str(refusal)})
        except UnavailableError as error:
            kind, status, more = _JSON, HTTPStatus.SERVICE_UNAVAILABLE, []
            body = orjson.dumps({"error": f"Database: {error}"})
        headers = [*_HEADERS, ("Content-Type", kind), *(more or [("Cache-Control", "no-store")])]
        if ("ETag", environ.get("HTTP_IF_NONE_MATCH")) in more:
            status, body = HTTPStatus.NOT_MODIFIED, b""
        start_response(f"{status.value} {status.phrase}", headers)
        return [body] if isinstance(body, bytes) else body

    def _answer(self, environ: WSGIEnvironment) -> tuple[Any, ...]:
        """Return content type, body, and headers.

        :raises _RefusedError: the request is refused.
        :raises UnavailableError: the database does not answer.
        """
        path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
        if self.mode == "off":
            raise _RefusedError(HTTPStatus.NOT_FOUND, "the page is turned off by IOT_LIVE_PAGE")
        page = "explorer.html" if self.mode == "full" else "metrics.html"
        asset = page if path == "/" else path.removeprefix("/explorer/assets/")
        if method in ("GET", "HEAD") and asset in self._assets:
            kind, content, tag = self._assets[asset]
            return kind, content, ("Cache-Control", "no-cache"), ("ETag", tag)
        if self.mode != "full":
            raise _RefusedError(HTTPStatus.NOT_FOUND, "IOT_LIVE_PAGE=metrics shows no topics")
        self._refuse_foreign(environ)
        if path == "/explorer/stream" and method == "POST":
            return self._stream(environ)
        question = {
            "/explorer/search": self._search,
            "/explorer/messages": self._messages,
            "/explorer/readings": self._readings,
        }.get(path)
        if question is None or method != "GET":
            raise _RefusedError(HTTPStatus.NOT_FOUND, "not found")
        if not self._questions.acquire(blocking=False):
            raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY)
        try:
            return _JSON, question(_Query(environ))
        finally:
            self._questions.release()

    def _refuse_foreign(self, environ: WSGIEnvironment) -> None:
        """Refuse requests from pages of other sites.

        They cannot read a response anyway, because there are no CORS headers. With DNS rebinding,
        where their host name resolves to this address, they could. Then the request has that name.
        """
        if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "requested by a page of another site")
        hosts = self._settings.live_page_hosts
        if not hosts and not self._settings.http_on_loopback:
            return
        with contextlib.suppress(ValueError):
            name = urlsplit("//" + environ.get("HTTP_HOST", "")).hostname or ""
            if name in map(str.lower, hosts) or name == "localhost" or _is_loopback(name):
                return
        raise _RefusedError(
            HTTPStatus.FORBIDDEN,
            "this host name is not allowed; behind a reverse proxy, set "
            "IOT_LIVE_PAGE_HOSTS to the host names in the browser's address bar",
        )

    def _stream(self, environ: WSGIEnvironment) -> tuple[Any, ...]:
        # A page of another site may send this content type only after a CORS preflight request.
        if environ.get("CONTENT_TYPE", "").partition(";")[0] != _JSON:
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"send {_JSON}")
        try:
            view = View.model_validate_json(environ["wsgi.input"].read(_MOST_BODY))
        except pydantic.ValidationError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from error
        stopped = self._enter(view.viewer)
        stream = Stream(view, self._reader, self._topics, self._rates, self._report)
        body = _Body(stream.events(stopped), lambda: self._leave(view.viewer, stopped))
        # X-Accel-Buffering: nginx would buffer the events.
        more = ("Cache-Control", "no-store"), ("X-Accel-Buffering", "no")
        return "text/event-stream", body, *more

    def _enter(self, viewer: str) -> threading.Event:
        """Register a viewer, and end its previous stream."""
        with self._lock:
            if viewer in self._viewers:
                self._viewers[viewer].set()
            elif len(self._viewers) >= VIEWERS:
                raise _RefusedError(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    f"this page is already open {VIEWERS} times; close one of them",
                )
            if not self._streams.acquire(blocking=False):
                raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY)
            self._viewers[viewer] = stopped = threading.Event()
            return stopped

    def _leave(self, viewer: str, stopped: threading.Event) -> None:
        self._streams.release()
        with self._lock:
            if self._viewers.get(viewer) is not stopped:
                return  # it has a newer stream
            del self._viewers[viewer]
            last = not self._viewers
        if last:
            self._reader.close()

    def _search(self, query: "_Query") -> bytes:
        with contextlib.suppress(UnavailableError):
            self._topics.refresh()
        nodes, left_out = self._topics.search(query.text("text"), 50)
        return orjson.dumps({"nodes": nodes, "left_out": left_out})

    def _messages(self, query: "_Query") -> bytes:
        before = datetime.fromtimestamp(query.number("before"), UTC)
        values = {"topic": query.text("topic"), "since": "-infinity", "before": before, "limit": 50}
        rows = self._reader.ask(queries.MESSAGES, values)
        return f"[{','.join(message for _, message in rows)}]".encode()

    def _readings(self, query: "_Query") -> bytes:
        topic, span = query.text("topic"), query.number("seconds")
        if not 1 <= span <= _MOST_SPAN:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"seconds: 1 to {_MOST_SPAN}")
        values = {"topic": topic, "start": time.time() - span, "step": 0, "names": 8}
        values["limit"] = _MOST_READINGS + 1
        [[answer]] = self._reader.ask(queries.READINGS, values)
        if orjson.loads(answer)["messages"] > _MOST_READINGS:
            values |= {"step": span / _STEPS, "steps": _STEPS, "each": _EACH}
            [[answer]] = self._reader.ask(queries.SAMPLED_READINGS, values)
        return bytes(answer.encode())


class _Query:
    """The parameters of a request."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        # A WSGI server decodes the bytes of the request as ISO-8859-1 (PEP 3333).
        text = environ.get("QUERY_STRING", "").encode("latin-1").decode("utf-8", "replace")
        self._values: dict[str, list[str]] = parse_qs(text, keep_blank_values=True)

    def text(self, name: str) -> str:
        """Return a parameter.

        :raises _RefusedError: it is missing, or contains U+0000, which PostgreSQL does not accept.
        """
        value = self._values.get(name, ["\0"])[0]
        if "\0" in value:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"{name}: missing, or contains U+0000")
        return value

    def number(self, name: str) -> float:
        """Return a number.

        :raises _RefusedError: it is missing or not a finite number.
        """
        with contextlib.suppress(ValueError, OverflowError):
            value = float(self.text(name))
            if abs(value) < 4e9:
                return value
        raise _RefusedError(HTTPStatus.BAD_REQUEST, f"{name}: not a number")


class _Body:
    """An iterable of events that calls ``at_end`` when it is closed, even if never iterated."""

    def __init__(self, events: Iterator[bytes], at_end: Callable[[], None]) -> None:
        self._events = events
        self._at_end = at_end

    def __iter__(self) -> Iterator[bytes]:
        """Yield the events."""
        return self._events

    def close(self) -> None:
        """Called by the server at the end of the response, whatever its reason (PEP 3333)."""
        self._at_end()


def _assets() -> dict[str, tuple[str, bytes, str]]:
    """Return content type, content and entity tag of each file of the pages."""
    found = {}
    folder = files(__package__) / "assets"
    for place, prefix in ((folder, ""), (folder / "vendor", "vendor/")):
        for file in place.iterdir():
            kind = _TYPES.get(file.name.rpartition(".")[2])
            if file.is_file() and kind is not None:
                content = file.read_bytes()
                tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
                found[prefix + file.name] = (kind, content, tag)
    return found


def _is_loopback(name: str) -> bool:
    return ip_address(name).is_loopback
