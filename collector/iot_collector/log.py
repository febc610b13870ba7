"""Structured logs of the collector and its libraries, as JSON or as text for a console."""

import logging
import sys

import structlog
from structlog.stdlib import ProcessorFormatter, add_log_level, add_logger_name

from .settings import Settings


def configure(settings: Settings) -> None:
    """Write all logs to standard error, with the format and level of the settings."""
    time = structlog.processors.TimeStamper(fmt="iso", utc=True)
    shared: list[structlog.typing.Processor] = [add_log_level, add_logger_name, time]
    final: list[structlog.typing.Processor] = [ProcessorFormatter.remove_processors_meta]
    if settings.log_format == "json":
        final.append(structlog.processors.format_exc_info)
        final.append(structlog.processors.JSONRenderer(default=repr))
    else:
        # The other formatters print local variables, which may contain passwords.
        plain = structlog.dev.plain_traceback
        final.append(
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)
        )
    structlog.configure(
        processors=[*shared, ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(ProcessorFormatter(foreign_pre_chain=shared, processors=final))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


def one_line(error: Exception) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())
