"""Lines of the log: what they say, where they go, and what they cost those who write them."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
import threading
import time

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from pydantic import ValidationError

from deployments.observability.lines import JsonLines, TextLines
from deployments.observability.logs import (
    MAX_WAITING,
    REQUEST_ID,
    LogQueue,
    ProcessLog,
    current_setting,
)
from deployments.observability.options import LoggingOptions, TracingOptions
from engine.errors import ConfigError
from tests.deployments.observability.conftest import PLACE

logger = logging.getLogger("trunkline.test")


def lines_in(folder):
    (file,) = folder.glob("*.log")
    return [json.loads(line) for line in file.read_text().splitlines()]


def quiet(tmp_path, **more):
    return {"console": False, "format": "json", "folder": str(tmp_path / "logs"), **more}


def failing(record_id):
    try:
        raise RuntimeError("broken\nin two")
    except RuntimeError:
        logger.exception("step %s failed", record_id)


def test_json_lines_say_where_they_come_from_and_what_about(configure, tmp_path):
    flush = configure(**quiet(tmp_path))
    token = REQUEST_ID.set("mine")
    logger.info("two\nlines of %s", "text", extra={"path": '/v1/"x"', "status": 200})
    REQUEST_ID.reset(token)
    logging.getLogger("ray.serve").warning("of Serve", extra={"request_id": "serves"})
    failing(7)
    flush()
    first, second, third = lines_in(tmp_path / "logs")
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "component": "engine",
        "model": "m",
        "instance": "r1",
        "request_id": "mine",
        "path": '/v1/"x"',
        "status": 200,
        "logger": "trunkline.test",
        "message": "two\nlines of text",
    }
    assert (second["request_id"], second["logger"]) == ("serves", "ray.serve")
    assert third["message"] == "step 7 failed" and "broken\nin two" in third["exception"]
    assert "request_id" not in third


def record_of(message, **extra):
    return logging.makeLogRecord(
        {
            "name": "n",
            "levelno": 20,
            "levelname": "INFO",
            "msg": message,
            "component": "ingress",
            **extra,
        }
    )


def test_text_lines_cannot_be_forged():
    made = TextLines().format(record_of("a\n2026 ERROR forged", id="x y\n", note="plain"))
    first, *rest = made.splitlines()
    assert " INFO ingress: a" in first
    assert rest == ['    2026 ERROR forged id="x y\\n" note=plain']


def test_json_lines_hold_whatever_comes():
    made = JsonLines().format(record_of("\ud800 \x1b \u2028", what=object, of=[b"x"]))
    assert len(made.splitlines()) == 1
    assert json.loads(made)["message"] == "\ud800 \x1b \u2028"


def test_levels_and_access_logs_are_left_out(configure, tmp_path):
    flush = configure(**quiet(tmp_path, level="WARNING"))
    logger.info("too quiet")
    logging.getLogger("ray.serve").error("GET / 200", extra={"serve_access_log": True})
    logger.warning("loud")
    flush()
    assert [line["message"] for line in lines_in(tmp_path / "logs")] == ["loud"]


def test_files_are_put_aside_when_they_are_long(configure, tmp_path):
    flush = configure(**quiet(tmp_path, max_bytes=4096, backups=2))
    for number in range(100):
        logger.info("line %d of a hundred", number)
    flush()
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == [f"engine-m-r1.log{end}" for end in ("", ".1", ".2")]
    assert all(file.stat().st_size <= 4096 for file in files)
    assert "line 99" in files[0].read_text()


def test_to_configure_anew_replaces_the_setting(configure, tmp_path):
    configure(**quiet(tmp_path))
    flush = configure(**quiet(tmp_path))
    assert current_setting() == ProcessLog(LoggingOptions(**quiet(tmp_path)), PLACE)
    logger.info("once")
    flush()
    assert len(lines_in(tmp_path / "logs")) == 1


def test_the_console_is_standard_error(tmp_path):
    code = (
        "import logging; from deployments.observability.logs import *;"
        "configure_logging(ProcessLog(LoggingOptions(format='json'), Place('ingress')));"
        "logging.getLogger('trunkline').info('hello'); logging.getLogger('x').info('not ours')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    (line,) = done.stderr.splitlines()
    assert (json.loads(line)["message"], done.stdout) == ("hello", b"")


class Slow(logging.Handler):
    """Writes nothing until it may."""

    def __init__(self):
        super().__init__()
        self.may_write = threading.Event()
        self.written = []

    def emit(self, record):
        self.may_write.wait()
        self.written.append(record)


def test_a_slow_place_holds_up_nobody_and_what_is_lost_is_told():
    slow = Slow()
    log = LogQueue(ProcessLog(LoggingOptions(), PLACE), [slow])
    for _ in range(MAX_WAITING + 100):
        log.handle(record_of("many"))
    slow.may_write.set()
    while log.queue.qsize() >= MAX_WAITING:
        time.sleep(0.001)
    log.handle(record_of("last"))
    log.close()
    lost = slow.written[-1].num_lost
    assert lost > 0 and len(slow.written) + lost == MAX_WAITING + 101


class Failing(logging.Handler):
    """Fails, or logs for each line another one."""

    def __init__(self, logs):
        super().__init__()
        self.logs = logs

    def emit(self, record):
        if not self.logs:
            raise RuntimeError("no connection")
        logging.getLogger("urllib3").warning("try again")


@pytest.mark.parametrize("logs", [False, True])
def test_a_handler_that_fails_spoils_only_its_own_lines(logs, monkeypatch):
    good = Slow()
    good.may_write.set()
    log = LogQueue(ProcessLog(LoggingOptions(), PLACE), [Failing(logs), good])
    monkeypatch.setattr(logging.getLogger("urllib3"), "handlers", [log])
    for number in range(3):
        log.handle(record_of(f"line {number}"))
    log.close()
    assert [record.getMessage() for record in good.written] == ["line 0", "line 1", "line 2"]


def test_files_hold_whatever_comes(configure, tmp_path):
    flush = configure(**quiet(tmp_path, format="text"))
    (log,) = (each for each in logging.getLogger().handlers if isinstance(each, LogQueue))
    log.handle(record_of("half of \ud800 a pair"))  # not to pytest's own, whose workers choke on it
    flush()
    (file,) = (tmp_path / "logs").iterdir()
    assert "half of \\ud800 a pair" in file.read_text()


def test_lines_that_wait_keep_nothing_of_what_failed():
    slow = Slow()
    log = LogQueue(ProcessLog(LoggingOptions(), PLACE), [slow])
    try:
        raise RuntimeError("broken")
    except RuntimeError as error:
        log.handle(record_of("failed", exc_info=(type(error), error, error.__traceback__)))
    slow.may_write.set()
    log.close()
    (record,) = slow.written
    assert record.exc_info is None
    assert "RuntimeError: broken" in json.loads(JsonLines().format(record))["exception"]


def test_further_places_come_from_a_file(configure, tmp_path):
    own = tmp_path / "own.log"
    file = tmp_path / "handlers.yaml"
    file.write_text(
        "formatters: {short: {format: '%(component)s %(request_id)s %(message)s'}}\n"
        "handlers:\n"
        f"  short: {{class: logging.FileHandler, filename: {own}, formatter: short}}\n"
        f"  like: {{class: logging.FileHandler, filename: {own}2, level: WARNING}}\n"
    )
    flush = configure(console=False, format="json", handlers_file=str(file))
    logger.info("quiet", extra={"request_id": "r"})
    logger.warning("loud")
    flush()
    assert own.read_text() == "engine r quiet\nengine None loud\n"
    assert json.loads((tmp_path / "own.log2").read_text())["message"] == "loud"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("{", "neither YAML nor JSON"),
        ("[]", "must have `handlers`"),
        ("handlers: {}", "must have `handlers`"),
        ("handlers: [a]", "must have `handlers`"),
        ("handlers: {a: {}}\nformatters: [b]", "must have `handlers`"),
        ("handlers: {a: {}}\nloggers: {}", "only `formatters`"),
    ],
)
def test_a_bad_file_of_handlers_is_named(tmp_path, text, words):
    file = tmp_path / "handlers.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        LoggingOptions(handlers_file=str(file)).check()


def test_a_handler_that_cannot_be_made_is_named_and_its_secrets_are_not(configure, tmp_path):
    file = tmp_path / "handlers.yaml"
    file.write_text("handlers: {mine: {class: logging.FileHandler, password: s3cret}}")
    for use in (configure, lambda **options: LoggingOptions(**options).check()):
        with pytest.raises(ConfigError, match="'mine' cannot be made") as caught:
            use(handlers_file=str(file))
        assert "s3cret" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(configure, tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(ConfigError, match=r"logging\.folder"):
        configure(**quiet(tmp_path))
    with pytest.raises(ConfigError, match=r"logging\.folder .* cannot be written to"):
        LoggingOptions(folder=str(tmp_path / "logs")).check()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "LOUD"}, "level"),
        ({"format": "xml"}, "format"),
        ({"folder": "logs"}, "from the root"),
        ({"max_bytes": 10}, "max_bytes"),
        ({"backups": 0}, "backups"),
        ({"otlp_endpoint": "collector:4318"}, "no address"),
        ({"otlp_endpoint": "http://user:secret@collector"}, "no address"),
        ({"prompts": True}, "prompts"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValidationError, match=words):
        LoggingOptions(**options)


@pytest.mark.parametrize("options", [LoggingOptions, TracingOptions])
def test_a_missing_exporter_is_named(monkeypatch, options):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(ConfigError, match=r"pip install 'trunkline\[otel\]'"):
        options(otlp_endpoint="http://collector:4318/").check()
    options().check()


def test_lines_go_to_a_collector(configure, collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=k1")
    flush = configure(console=False, otlp_endpoint=collector.url)
    logger.warning("hello %s", "there", extra={"request_id": "mine", "engines": ["a"]})
    failing(7)
    flush()
    told = []
    for path, headers, body in collector.received:  # the two lines may go one by one
        assert (path, headers["api-key"]) == ("/v1/logs", "k1")
        is_packed = headers.get("Content-Encoding") == "gzip"
        text = gzip.decompress(body) if is_packed else body
        (logs,) = ExportLogsServiceRequest.FromString(text).resource_logs
        resource = {each.key: each.value.string_value for each in logs.resource.attributes}
        assert resource["service.name"] == "trunkline-engine"
        told += [record for scope in logs.scope_logs for record in scope.log_records]
    hello, failure = told
    values = {each.key: each.value.string_value for each in hello.attributes}
    assert (hello.body.string_value, hello.severity_number) == ("hello there", 13)
    assert (values["request_id"], values["model"]) == ("mine", "m")
    assert any("RuntimeError" in each.value.string_value for each in failure.attributes)
