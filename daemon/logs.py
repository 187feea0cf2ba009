"""Logging: one line per state change, JSON for machines and plain text in a terminal; never a secret, never claim text."""

from __future__ import annotations

import logging
import sys

import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(level: str, style: str) -> None:
    """Write lines of `level` and graver to standard error; `style` is json, text, or auto (text in a terminal)."""
    is_text = style == "text" or (style == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = structlog.dev.ConsoleRenderer() if is_text else structlog.processors.JSONRenderer()
    # A traceback shows lines of code, never the values they worked on: those may be claims.
    processors: list[structlog.typing.Processor] = [*shared, structlog.processors.format_exc_info, renderer]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),  # a line and its end at once, whichever thread writes beside it
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.getLogger("apscheduler").setLevel(logging.ERROR)  # a tick that takes longer than a second is no news
    logging.basicConfig(level=max(LEVELS[level], logging.WARNING), handlers=[handler], force=True)
