"""`trunkline complete`: one completion to stdout."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import aclosing
from typing import Any

from deployments.cli.client import Client
from deployments.cli.sampling import given_options
from deployments.cli.terminal import write


def run(options: argparse.Namespace) -> int:
    """Complete the prompt; returns the exit status.

    Raises:
        CommandError: there is no server, or it refuses the request.
        ConfigError: the model cannot be loaded in this process.
        InvalidRequest: that model cannot serve the request.
    """
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    wanted = given_options(options)
    if options.offline is not None:
        _complete_here(options.offline, prompt, wanted)
    else:
        asyncio.run(_ask(options.url, options.model, prompt, wanted))
    write("\n")
    return 0


def _complete_here(model: str, prompt: str, wanted: dict[str, Any]) -> None:
    from engine import LLM, SamplingParams  # imports torch

    params = SamplingParams(**wanted)  # wrong ones are told before the model is loaded
    for delta in LLM(model).stream(prompt, params):
        write(delta.text)


async def _ask(url: str, model: str | None, prompt: str, wanted: dict[str, Any]) -> None:
    async with Client(url) as client:
        body = {"model": model or await client.first_model(), "prompt": prompt, **wanted}
        async with aclosing(client.stream("/v1/completions", body)) as choices:
            async for choice in choices:
                write(str(choice.get("text") or ""))
