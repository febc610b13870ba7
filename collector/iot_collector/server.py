"""The HTTP thread: /metrics, /health, /livez, /readyz and the live page."""

import threading
from collections.abc import Callable, Iterable
from importlib import resources
from typing import TYPE_CHECKING, Any, cast
from wsgiref.types import StartResponse, WSGIEnvironment

import orjson
import waitress.server
from prometheus_client import make_wsgi_app

from .health import Health
from .metrics import Metrics
from .settings import Settings, SettingsError

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

_JSON = "application/json"
_HTML = "text/html; charset=utf-8"


class Server(threading.Thread):
    """Serves HTTP until the process ends."""

    def __init__(self, settings: Settings, health: Health, metrics: Metrics) -> None:
        """Bind the port.

        :raises SettingsError: it cannot be bound.
        """
        super().__init__(name="http", daemon=True)
        host, port = settings.http_host, settings.http_port
        options: dict[str, Any] = {"threads": 2, "channel_timeout": 10, "ident": "iot-collector"}
        try:
            self._server = waitress.server.create_server(
                _application(health, metrics), host=host, port=port, **options
            )
        except OSError as error:
            raise SettingsError(
                f"IOT_HTTP_PORT: cannot listen on {host}:{port} ({error.strerror}); "
                "stop what uses it or choose another port, for example 3100"
            ) from error

    def run(self) -> None:
        """Answer requests."""
        self._server.run()


def _application(health: Health, metrics: Metrics) -> "WSGIApplication":
    page = (resources.files(__package__) / "live.html").read_bytes()
    metrics_app = make_wsgi_app(metrics.registry)
    probes: dict[str, Callable[[], dict[str, object]]] = {
        "/health": health.report,
        "/livez": health.live,
        "/readyz": health.ready,
    }

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return cast("Iterable[bytes]", metrics_app(environ, start_response))
        if path == "/":
            return _answer(start_response, "200 OK", _HTML, page)
        if path in probes:
            report = probes[path]()
            status = "200 OK" if report["status"] == "ok" else "503 Service Unavailable"
            return _answer(start_response, status, _JSON, orjson.dumps(report))
        return _answer(start_response, "404 Not Found", _JSON, b'{"status":"not found"}')

    return application


def _answer(start: StartResponse, status: str, kind: str, body: bytes) -> Iterable[bytes]:
    start(status, [("Content-Type", kind), ("Cache-Control", "no-store")])
    return [body]
