"""The collector as a process: starts the threads, watches them, and drains them at the end."""

import signal
import threading
import time

import structlog

from . import __version__
from .flow import Flow
from .health import Health
from .link import Link
from .metrics import Metrics
from .server import serve
from .settings import Settings
from .writer import Writer

log = structlog.get_logger(__name__)

GRACE = 60  # looks at /livez, a second apart, that fail in a row until the process ends itself


def run(settings: Settings) -> int:
    """Collect until SIGTERM or SIGINT; return the exit status.

    Status 0 after a signal; 1 when a thread died, or /livez has failed for a minute, which is a
    bug: a restart is the cure.
    """
    threading.excepthook = _log_death
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    flow = Flow(max_bytes=settings.buffer_bytes)
    metrics = Metrics(flow)
    link = Link(settings, flow, metrics)
    writer = Writer(settings, flow, metrics, link.acknowledge)
    health = Health(settings, flow, link, writer)
    serve(settings, health)
    writer.start()
    link.start()
    log.info(
        "collector started",
        version=__version__,
        broker=str(settings.broker),
        topics=settings.mqtt_topics,
        http=f"http://{settings.http_host}:{settings.http_port}",
    )
    failures = 0
    while not stop.wait(1.0):
        writer.break_if_overdue()
        problems = health.live()["problems"]
        # Counted, not timed: a process that was stopped for a while is well when it goes on.
        failures = failures + 1 if problems else 0
        if failures > GRACE or not (link.is_alive() and writer.is_alive()):
            log.critical("exiting to be restarted", problems=problems)
            return 1
    log.info("draining", in_flight=flow.account().in_flight)
    until = time.monotonic() + settings.drain_seconds
    if settings.leave_on_stop:
        link.leave()
        if not link.left.wait(settings.drain_seconds):
            log.warning("session kept: the broker has messages that this process did not get done")
    # Store and acknowledge what has been received; what cannot be stays with the broker.
    flow.close()
    writer.join(max(0.0, until - time.monotonic()))
    writer.abandon()
    link.stop()
    link.join(max(0.0, until - time.monotonic()) + 6)
    account = flow.account()
    log.info("stopped", received=account.received, stored=account.inserted)
    return 0


def _log_death(death: threading.ExceptHookArgs) -> None:
    """Log the exception that ends a thread like everything else, with its traceback."""
    name = death.thread.name if death.thread else None
    log.critical("a bug ended a thread", thread=name, exc_info=death.exc_value)
