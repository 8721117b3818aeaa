"""Sets up the log of a process: lines from one place, written by a thread of their own."""

from __future__ import annotations

import logging
import re
import sys
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from deployments.observability.lines import JsonLines, TextLines
from deployments.observability.options import LoggingOptions
from deployments.observability.own_handlers import build_handlers
from engine.errors import ConfigError

REQUEST_ID: ContextVar[str] = ContextVar("request_id")
"""Of the request that this context works for; lines that are logged in it tell."""
MAX_WAITING = 8192
"""Lines that may wait for a slow disk or collector; more are dropped, and the next one that is not
says how many."""
_SERVE = "ray.serve"
_PLAIN = logging.Formatter()


@dataclass(frozen=True, slots=True)
class Place:
    """Where lines come from."""

    component: str
    """`ingress`, `engine_replica`, `engine` or `rank`."""
    model: str | None = None
    """Served name, of all but the ingress."""
    instance: str | None = None
    """Id of the Serve replica that the process is, or belongs to."""


class ProcessLog(NamedTuple):
    """How a process logs."""

    options: LoggingOptions
    place: Place


class _Writer(QueueListener):
    """Has records written by handlers; one that fails ends neither the thread nor other lines."""

    ident: int | None = None
    """Of the thread, once it has had a record."""

    def handle(self, record: logging.LogRecord) -> None:
        """Have a record written."""
        self.ident = threading.get_ident()
        for handler in self.handlers:
            if record.levelno >= handler.level:
                try:
                    handler.handle(record)
                except Exception:
                    handler.handleError(record)


class LogQueue(QueueHandler):
    """Takes records where they are made, which must not wait, to the thread that writes them.

    What handlers log while they write goes to standard error alone: for each such line they would
    log another.

    Args:
        setting: of the process.
        handlers: write them.
    """

    def __init__(self, setting: ProcessLog, handlers: list[logging.Handler]) -> None:
        self._waiting: SimpleQueue[Any] = SimpleQueue()
        super().__init__(self._waiting)
        self.setting = setting
        self._num_lost = 0
        self._handlers = handlers
        self._is_closed = False
        self._aside = logging.StreamHandler(sys.__stderr__)
        self._writer = _Writer(self._waiting, *handlers)
        self._writer.start()

    def handle(self, record: logging.LogRecord) -> bool:
        """Queue a record, unless it comes from a handler, which would also wait at exit for the
        lock that is held while the thread ends."""
        if threading.get_ident() != self._writer.ident:
            return bool(super().handle(record))
        if record.levelno >= logging.WARNING:
            self._aside.handle(record)
        return False

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Note in a record what only this context knows."""
        record.msg, record.args = record.getMessage(), None
        values = record.__dict__
        place = self.setting.place
        values.setdefault("component", place.component)
        values.setdefault("model", place.model)
        values.setdefault("instance", place.instance)
        values.setdefault("request_id", REQUEST_ID.get(None))
        if self._num_lost:
            values["num_lost"] = self._num_lost
        if record.exc_info:  # would keep what its frames hold, such as bodies, while it waits
            record.exc_text = record.exc_text or _PLAIN.formatException(record.exc_info)
            record.exc_info = None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a record, or count it as lost."""
        if self._waiting.qsize() < MAX_WAITING:
            self._waiting.put(record)
            self._num_lost = 0
        else:
            self._num_lost += 1

    def close(self) -> None:
        """Write what waits, and end the thread."""
        if not self._is_closed:
            self._is_closed = True
            self._writer.stop()
            for handler in self._handlers:
                handler.close()
        super().close()


def configure_logging(setting: ProcessLog) -> None:
    """Let all that this process logs go where the options say, in place of an earlier setting.

    Serve's own file of a replica, which the dashboard shows, stays as `logging_config` has it.

    Raises:
        ConfigError: a file cannot be written, or a handler cannot be made.
    """
    options = setting.options
    loggers = logging.getLogger(), logging.getLogger(_SERVE)
    for logger in loggers:  # the latter passes nothing on to the former
        for handler in list(logger.handlers):
            # Serve's for the console, which writes no other form.
            if isinstance(handler, LogQueue) or type(handler) is logging.StreamHandler:
                logger.removeHandler(handler)
                handler.close()
    log = LogQueue(setting, _handlers(options, setting.place))
    log.setLevel(options.level)
    log.addFilter(lambda record: not getattr(record, "serve_access_log", False))
    for logger in loggers:
        logger.addHandler(log)
    logging.getLogger("trunkline").setLevel(options.level)


def current_setting() -> ProcessLog | None:
    """How this process logs; None where that was not configured."""
    handlers = logging.getLogger().handlers
    return next((each.setting for each in handlers if isinstance(each, LogQueue)), None)


def _handlers(options: LoggingOptions, place: Place) -> list[logging.Handler]:
    form = JsonLines() if options.format == "json" else TextLines()
    handlers: list[logging.Handler] = []
    if options.console:
        handlers.append(logging.StreamHandler(sys.__stderr__))  # Serve may log what `stderr` gets
    if options.folder is not None:
        handlers.append(_file_handler(options, place, Path(options.folder)))
    for handler in handlers:
        handler.setFormatter(form)
    if options.handlers_file is not None:
        handlers += build_handlers(options.handlers_file, form)
    if options.otlp_endpoint is not None:
        from deployments.observability.otlp import OtlpHandler

        handlers.append(OtlpHandler(options.otlp_endpoint, place))
    return handlers


def _file_handler(options: LoggingOptions, place: Place, folder: Path) -> RotatingFileHandler:
    """Of a file that is this process's alone: several cannot take turns with one."""
    name = "-".join(filter(None, (place.component, place.model, place.instance)))
    path = folder / (re.sub(r"[^\w.-]", "-", name) + ".log")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return RotatingFileHandler(
            path, "a", options.max_bytes, options.backups, "utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise ConfigError(
            f"logging.folder '{folder}' cannot be written to: {error.strerror}."
        ) from None
