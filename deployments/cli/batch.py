"""`trunkline batch`: answers a file of requests."""

from __future__ import annotations

import argparse
import asyncio
import email.utils
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from tqdm import tqdm

from deployments.cli.batch_file import (
    BadLine,
    BatchRequest,
    Done,
    answer_record,
    bad_line_key,
    error_record,
    open_output,
    parse_line,
    read_lines,
)
from deployments.cli.client import KEY_VARIABLE, Answer, Client, error_message
from deployments.cli.errors import CommandError

Post = Callable[[str, bytes], Awaitable[Answer]]
"""Sends a body to a path and waits for the whole answer; OSError when nobody answers."""

DEFAULT_CONCURRENCY = {"server": 32, "local": 256}
BUSY = (429, 503)
"""Statuses that ask to come again later."""
UNAUTHORIZED = 401
"""Says that the key is wrong, and nothing of the request: no answer to keep."""
GOES_ON = "what is answered is written, and to run this again goes on with the rest."
LONGEST_PAUSE_S = 60.0
MAX_BUSY = 100
"""So often is a request sent again; then the refusal is its answer."""
MAX_LOST = 6
"""So many tries in a row may reach nobody, in about a minute, before the run gives up."""


def run(options: argparse.Namespace) -> int:
    """Answer every request that has no answer yet; returns the exit status: 1 if any failed.

    Raises:
        CommandError: the server was lost, or takes the key no more; to run the command again goes
            on.
        ConfigError: the model cannot be loaded.
    """
    if options.concurrency is not None and options.concurrency < 1:
        raise CommandError("--concurrency must be at least 1.")
    if options.url is not None and (options.model or options.settings):
        raise CommandError("--url asks a server as it is: leave --model and --set out.")
    total = sum(1 for _ in read_lines(options.input))
    where = "local" if options.url is None else "server"
    concurrency = options.concurrency or DEFAULT_CONCURRENCY[where]
    return asyncio.run(_run(options, total, concurrency))


async def _run(options: argparse.Namespace, total: int, concurrency: int) -> int:
    file, done = open_output(options.output)
    with file:
        async with _open_post(options) as post:
            with tqdm(total=total, desc="Requests", unit="", dynamic_ncols=True) as bar:

                def write(record: dict[str, object]) -> None:
                    file.write(json.dumps(record).encode() + b"\n")
                    file.flush()
                    done.tally.count(record)
                    bar.update()

                runner = BatchRunner(post, write, concurrency)
                await runner.run(_left(options.input, done, write, bar.update))
    print(f"{done.tally}; see {options.output}")
    return 1 if done.tally.num_failed else 0


@asynccontextmanager
async def _open_post(options: argparse.Namespace) -> AsyncIterator[Post]:
    if options.url is not None:
        async with Client(options.url) as client:
            await client.first_model()  # a wrong address is told at once
            yield client.post
        return
    from deployments.cli.local_app import open_local_app, post_to  # takes seconds
    from deployments.cli.settings import local_model

    name, model = local_model(options.model, options.settings)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # tells of trunks
    async with open_local_app(name, model) as app:
        yield partial(post_to, app)


def _left(
    path: Path, done: Done, write: Callable[[dict[str, object]], None], skip: Callable[[], object]
) -> Iterator[BatchRequest]:
    """The requests of a file that have no answer yet; lines that are none are answered here."""
    seen: set[str] = set()
    for number, line in read_lines(path):
        try:
            request = parse_line(line)
            if request.custom_id in seen:
                raise BadLine(
                    "duplicate_custom_id", "An earlier line has this custom_id.", request.custom_id
                )
        except BadLine as error:
            if bad_line_key(error.custom_id, number, error.code) in done.bad_lines:
                skip()
            else:
                write(error_record(number, error))
            continue
        seen.add(request.custom_id)
        if request.custom_id in done.custom_ids:
            skip()
        else:
            yield request


class BatchRunner:
    """Sends requests, so many at once, and again where nobody had time for them.

    Args:
        post: sends one.
        write: takes the record of one that has its answer.
        concurrency: most requests under way.
    """

    def __init__(
        self, post: Post, write: Callable[[dict[str, object]], None], concurrency: int
    ) -> None:
        self._post = post
        self._write = write
        self._concurrency = concurrency

    async def run(self, requests: Iterator[BatchRequest]) -> None:
        """Answer all of them.

        Raises:
            CommandError: the server was lost, or takes the key no more.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._concurrency):
                    group.create_task(self._work(requests))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _work(self, requests: Iterator[BatchRequest]) -> None:
        for request in requests:  # shared by all workers, and never waits
            answer = await self._answer(request)
            self._write(answer_record(request.custom_id, answer))

    async def _answer(self, request: BatchRequest) -> Answer:
        body = json.dumps(request.body).encode()
        num_busy = num_lost = 0
        while True:
            try:
                answer = await self._post(request.url, body)
            except OSError as error:
                num_lost += 1
                if num_lost > MAX_LOST:
                    raise CommandError(f"the server was lost ({error}); {GOES_ON}") from None
                await asyncio.sleep(2.0 ** (num_lost - 1))
                continue
            num_lost = 0
            if answer.status == UNAUTHORIZED:
                raise CommandError(
                    f"the server asks for another API key than that in {KEY_VARIABLE} (it answered "
                    f"401 to '{request.custom_id}': {error_message(answer.body)}); {GOES_ON}"
                )
            if answer.status not in BUSY or num_busy >= MAX_BUSY:
                return answer
            num_busy += 1
            await asyncio.sleep(pause_s(answer.headers.get("retry-after"), num_busy))


def pause_s(retry_after: str | None, number: int) -> float:
    """Seconds until the next try: what the server says, else more each time.

    Args:
        retry_after: the header, seconds or a date.
        number: of the try, from 1.
    """
    seconds = min(2.0 ** (number - 1), LONGEST_PAUSE_S)
    if retry_after is not None:
        try:
            seconds = float(retry_after)
        except ValueError:
            if (date := email.utils.parsedate_tz(retry_after)) is not None:
                seconds = email.utils.mktime_tz(date) - time.time()
    return min(max(seconds, 0.0), LONGEST_PAUSE_S)
