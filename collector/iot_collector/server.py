"""HTTP: /metrics, /health, /livez, /readyz and the live page."""

import errno
import socket
import threading
from collections.abc import Iterable
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import orjson
import waitress.server
from prometheus_client import make_wsgi_app
from waitress.adjustments import Adjustments

from . import explorer
from .health import Health
from .settings import Settings, SettingsError

_JSON = "application/json"


def serve(settings: Settings, health: Health) -> None:
    """Bind the port, and serve in a thread until the process ends, so that a drain can be watched.

    :raises SettingsError: the address or the port cannot be bound.
    """
    host, port = settings.http_host, settings.http_port
    options: dict[str, Any] = {
        "threads": 2 + explorer.THREADS,  # two are left for probes when the page uses the others
        "channel_timeout": 10,
        "ident": "iot-collector",
        "max_request_body_size": 1 << 18,
        "log_socket_errors": False,  # otherwise each closed page is logged
        # Notice at once that a viewer has left; queue little for one that reads too slowly.
        "channel_request_lookahead": 1,
        "outbuf_high_watermark": 1 << 19,
    }
    # Close the connection of a viewer that has not answered for 20 s (tcp(7)). waitress has no
    # option for it, only this attribute.
    Adjustments.socket_options = [
        *Adjustments.socket_options,
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000),
    ]
    try:
        server = waitress.server.create_server(
            _application(settings, health), host=host, port=port, **options
        )
    except (OSError, ValueError) as error:
        # waitress raises ValueError if the name cannot be resolved.
        if isinstance(error, ValueError) or error.errno == errno.EADDRNOTAVAIL:
            raise SettingsError(
                f"IOT_HTTP_HOST: this machine has no address {host}; for example 0.0.0.0"
            ) from error
        raise SettingsError(
            f"IOT_HTTP_PORT: cannot listen on {host}:{port} ({error.strerror}); "
            "stop the program that uses it or choose another port, for example 3100"
        ) from error
    threading.Thread(target=server.run, name="http", daemon=True).start()


def _application(settings: Settings, health: Health) -> WSGIApplication:
    page = explorer.Explorer(settings, health.report)
    metrics: WSGIApplication = make_wsgi_app()
    reports = {"/health": health.report, "/livez": health.live, "/readyz": health.ready}

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return metrics(environ, start_response)
        if path == "/" or path.startswith("/explorer/"):
            return page(environ, start_response)
        if path in reports:
            report = reports[path]()
            status = "200 OK" if report["status"] == "ok" else "503 Service Unavailable"
            kind, body = _JSON, orjson.dumps(report)
        else:
            status, kind, body = "404 Not Found", _JSON, b'{"status":"not found"}'
        start_response(status, [("Content-Type", kind), ("Cache-Control", "no-store")])
        return [body]

    return application
