"""A logger that is configured for a test and left as it was, and a collector that listens."""

from __future__ import annotations

import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deployments.observability.logs import LogQueue, Place, ProcessLog, configure_logging
from deployments.observability.options import LoggingOptions

PLACE = Place("engine", "m", "r1")


@pytest.fixture
def configure():
    """Configure this process's log, which `flush` writes."""
    loggers = [logging.getLogger(name) for name in (None, "ray.serve", "trunkline")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]

    def flush():
        for handler in list(logging.getLogger().handlers):
            if isinstance(handler, LogQueue):
                handler.close()

    def run(**options):
        configure_logging(ProcessLog(LoggingOptions(**options), PLACE))
        return flush

    yield run
    flush()
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)


class Collector(BaseHTTPRequestHandler):
    """Takes what OTLP exporters post."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, dict(self.headers), body))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def collector():
    """An HTTP server that remembers what it received: path, headers, body; and answers `status`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.received, server.status = [], 200
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
