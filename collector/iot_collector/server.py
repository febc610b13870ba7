"""HTTP: /metrics, /health, /livez, /readyz and the live page."""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import orjson
import waitress.server
from prometheus_client import make_wsgi_app

from .health import Health
from .settings import Settings, SettingsError

_JSON = "application/json"
_HTML = "text/html; charset=utf-8"


def serve(settings: Settings, health: Health) -> None:
    """Bind the port, and serve in a thread until the process ends, so that a drain can be watched.

    :raises SettingsError: the port cannot be bound.
    """
    host, port = settings.http_host, settings.http_port
    options: dict[str, Any] = {"threads": 2, "channel_timeout": 10, "ident": "iot-collector"}
    try:
        server = waitress.server.create_server(
            _application(health), host=host, port=port, **options
        )
    except OSError as error:
        raise SettingsError(
            f"IOT_HTTP_PORT: cannot listen on {host}:{port} ({error.strerror}); "
            "stop what uses it or choose another port, for example 3100"
        ) from error
    threading.Thread(target=server.run, name="http", daemon=True).start()


def _application(health: Health) -> WSGIApplication:
    page = Path(__file__).with_name("live.html").read_bytes()
    metrics: WSGIApplication = make_wsgi_app()
    reports = {"/health": health.report, "/livez": health.live, "/readyz": health.ready}

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return metrics(environ, start_response)
        if path == "/":
            status, kind, body = "200 OK", _HTML, page
        elif path in reports:
            report = reports[path]()
            status = "200 OK" if report["status"] == "ok" else "503 Service Unavailable"
            kind, body = _JSON, orjson.dumps(report)
        else:
            status, kind, body = "404 Not Found", _JSON, b'{"status":"not found"}'
        start_response(status, [("Content-Type", kind), ("Cache-Control", "no-store")])
        return [body]

    return application
