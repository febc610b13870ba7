"""The collector as a process: starts the threads, watches them, and stops them at the end."""

import signal
import threading
import time

import structlog

from . import __version__
from .broker_metrics import BrokerMetricsThread
from .buffer import Buffer
from .health import Health
from .metrics import Metrics
from .network import NetworkThread
from .server import serve
from .settings import Settings
from .summaries import SummariesThread
from .writer import WriterThread

log = structlog.get_logger(__name__)

# The process exits after more failed checks of /livez in a row than this; one check a second.
MAX_FAILED_CHECKS = 60
_DISCONNECT_SECONDS = 6.0  # longer than the network thread takes to disconnect


def run(settings: Settings) -> int:
    """Collect until SIGTERM or SIGINT; return the exit status.

    0 after a signal; 1 when a thread ended or /livez has failed for a minute. Both are bugs, and a
    restart may help.
    """
    threading.excepthook = _log_end_of_thread
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    buffer = Buffer(max_bytes=settings.buffer_bytes)
    metrics = Metrics(buffer)
    network = NetworkThread(settings, buffer, metrics)
    writer = WriterThread(settings, buffer, metrics, network.acknowledge)
    health = Health(settings, buffer, network, writer)
    serve(settings, health)
    summaries = SummariesThread(settings, buffer, metrics)
    writer.start()
    network.start()
    broker_metrics = BrokerMetricsThread(settings) if settings.broker_metrics else None
    if broker_metrics is not None:
        broker_metrics.start()
    if settings.summary_seconds:
        summaries.start()
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
        # Counted, not timed, so that a process that was suspended does not exit when it resumes.
        failures = failures + 1 if problems else 0
        if failures > MAX_FAILED_CHECKS or not (network.is_alive() and writer.is_alive()):
            log.critical("exiting to be restarted", problems=problems)
            return 1
    summaries.stop(0)
    log.info("draining", in_flight=buffer.counts().in_flight)
    deadline = time.monotonic() + settings.drain_seconds
    if settings.leave_on_stop and not network.leave_session(settings.drain_seconds):
        log.warning("session kept: the broker still has messages for it")
    # Messages that are not stored in time are not acknowledged, so the broker keeps them.
    writer.stop(max(0.0, deadline - time.monotonic()))
    network.stop(max(0.0, deadline - time.monotonic()) + _DISCONNECT_SECONDS)
    if broker_metrics is not None:
        broker_metrics.stop()
    counts = buffer.counts()
    log.info("stopped", received=counts.received, stored=counts.inserted)
    return 0


def _log_end_of_thread(error: threading.ExceptHookArgs) -> None:
    """Log the exception that ends a thread, with its traceback."""
    name = error.thread.name if error.thread else None
    log.critical("a bug ended a thread", thread=name, exc_info=error.exc_value)
