"""Tells of a collector that does not answer once, instead of the SDK's lines for every attempt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

_log = logging.getLogger("trunkline.observability")


class TellingExporter:
    """An exporter around another, which tells when its collector is lost and when it is back.

    Args:
        exporter: of OpenTelemetry's; sends.
        what: it sends, for the log.
        endpoint: base address of the collector.
    """

    def __init__(self, exporter: Any, what: str, endpoint: str) -> None:
        self._exporter = exporter
        self._what = what
        self._endpoint = endpoint
        self._is_lost = False
        self._reason = ""
        self._lines = logging.getLogger(type(exporter).__module__)
        self._lines.addFilter(self._keep_reason)

    def export(self, batch: Sequence[Any]) -> Any:
        """Send a batch; gives the exporter's own result."""
        self._reason = ""
        result = self._exporter.export(batch)
        is_lost = result.name != "SUCCESS"
        if is_lost and not self._is_lost:
            _log.warning(
                "%s do not reach the collector at %s, and are dropped until they do: %s",
                *(self._what, self._endpoint, self._reason or "it does not answer"),
            )
        elif self._is_lost and not is_lost:
            _log.warning("%s reach the collector at %s again", self._what, self._endpoint)
        self._is_lost = is_lost
        return result

    def shutdown(self) -> None:
        """Let go of the connection."""
        self._exporter.shutdown()
        self._lines.removeFilter(self._keep_reason)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing waits here."""
        return True

    def _keep_reason(self, record: logging.LogRecord) -> bool:
        """Take what the exporter logs for the reason, and keep it from the log."""
        causes = [each for each in record.args or () if isinstance(each, Exception)]
        told = type(causes[0]).__name__ if causes else record.getMessage()
        self._reason = self._reason or told
        return False
