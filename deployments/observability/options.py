"""Options of logs and traces."""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from deployments.observability.own_handlers import build_handlers
from engine.errors import ConfigError
from engine.options import Options


def _is_endpoint(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", url):
        raise ValueError(
            f"'{url}' is no address of a collector; write it without a user and a query, such as "
            "http://collector:4318."
        )
    return url.rstrip("/")


Endpoint = Annotated[str, AfterValidator(_is_endpoint)]
"""Base address of an OTLP collector over HTTP; `/v1/logs` and `/v1/traces` are added to it. Headers
that it asks for are read from `OTEL_EXPORTER_OTLP_HEADERS`, in the environment of every node."""


class LoggingOptions(Options):
    """What is logged, and where it goes."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lines below this are left out."""
    format: Literal["text", "json"] = "text"
    """Of lines on the console and in files: for people, or a JSON object each."""
    requests: bool = False
    """Whether the ingress and the engine write a line at the end of each request. Those of requests
    that fail by the server's fault are written in any case. No line has prompts or answers."""
    console: bool = True
    """Whether lines go to the standard error of their process, which Ray keeps with its logs."""
    folder: str | None = None
    """Folder on each node for a file of every process; None writes none beside Ray's."""
    max_bytes: int = Field(default=64 * 2**20, ge=4096)
    """Size at which such a file is put aside and a new one begun."""
    backups: int = Field(default=4, ge=1)
    """Files put aside that are kept, of each process."""
    otlp_endpoint: Endpoint | None = None
    """Address of an OpenTelemetry collector that gets all lines, such as http://collector:4318; the
    secrets it asks for stand in `OTEL_EXPORTER_OTLP_HEADERS`."""
    handlers_file: str | None = None
    """File on each node of further places, such as syslog: `handlers` and `formatters` as
    Python's `logging.config` has them, in YAML or JSON."""

    @field_validator("folder")
    @classmethod
    def _is_absolute(cls, folder: str | None) -> str | None:
        if folder is not None and not Path(folder).is_absolute():
            raise ValueError(f"'{folder}' depends on where a process runs; give it from the root.")
        return folder

    def check(self) -> None:
        """Find out now what would else fail in every process.

        Raises:
            ConfigError: the folder or the file of handlers cannot be used, or a package is missing.
        """
        if self.folder is not None:
            _check_folder(Path(self.folder))
        if self.handlers_file is not None:
            for handler in build_handlers(self.handlers_file, logging.Formatter()):
                handler.close()
        if self.otlp_endpoint is not None:
            _check_exporter("logging.otlp_endpoint")


class TracingOptions(Options):
    """OpenTelemetry traces of requests."""

    otlp_endpoint: Endpoint | None = None
    """Address of the collector that gets the traces; None makes none."""
    sampling_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are traced. One whose client says in `traceparent` that it is not
    traced there is not traced here."""

    def check(self) -> None:
        """Find out now what would else fail in every process.

        Raises:
            ConfigError: a package is missing.
        """
        if self.otlp_endpoint is not None:
            _check_exporter("tracing.otlp_endpoint")


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"logging.folder '{folder}' cannot be written to: {error.strerror}; name another, or "
            "let the server's user write there."
        ) from None


def _check_exporter(option: str) -> None:
    try:
        import opentelemetry.exporter.otlp.proto.http  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{option} needs OpenTelemetry's exporter: pip install 'trunkline[otel]' on every node."
        ) from None
