"""The words of the command line.

Each command is a module of this package, imported when it runs: `trunkline --help` waits for
nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from deployments.cli.errors import CommandError
from engine.errors import TrunklineError

DEFAULT_URL = "http://127.0.0.1:8000"
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(words: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        words: of the command line, without the program; None takes those of this process.
    """
    options = _parser().parse_args(words)
    if options.command in ("serve", "check"):
        sys.path.append(os.getcwd())  # where the server's processes find plug-ins too
    try:
        command = importlib.import_module(f"deployments.cli.{options.command}")
        status = int(command.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except (CommandError, TrunklineError) as error:
        print(f"trunkline: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"trunkline: {where}{error.strerror or error}", file=sys.stderr)
    return 1


class _Version(argparse.Action):
    """Prints the version, which takes a moment to find out, only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"trunkline {version('trunkline')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trunkline", description="Serve and use language models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_check(commands)
    _add_chat(commands)
    _add_complete(commands)
    _add_batch(commands)
    bench = commands.add_parser(
        "bench",
        help="measure speed: `trunkline bench offline --help`",
        description="Runs `python -m benchmarks.SUITE` with the words that follow.",
    )
    bench.add_argument("suite", help="such as offline, serving or sweep")
    bench.add_argument("words", nargs=argparse.REMAINDER, help="passed on")
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="start a server on this machine",
        description="Starts a server and stays in the foreground; Ctrl-C ends it in order.",
    )
    _add_config(serve)
    serve.add_argument("--host", help="address to listen on")
    serve.add_argument(
        "--port", type=int, help="to listen on; default: $SERVICE_PORT, then as configured"
    )


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="say what a configuration would start, and whether it fits",
        description="Checks a configuration without starting anything.",
    )
    _add_config(check)
    check.add_argument(
        "--gpu-memory",
        type=_positive,
        metavar="GIB",
        help="memory of each GPU; default: that of this machine's",
    )
    check.add_argument("--address", help="of a Ray cluster: say where everything would run there")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        metavar="CONFIG",
        help="default: serve_config.yaml here; without one, the bundled model",
    )
    parser.add_argument(
        "--model", help="serve this model alone: a directory, a .gguf file, or the bundled one"
    )
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="that clients give the only model; default: $MODEL_NAME, then as configured",
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="most tokens of prompt and output together; default: the model's own, at most 4096",
    )
    parser.add_argument(
        "--limit-concurrency",
        type=int,
        metavar="N",
        help="completions under way in an ingress replica; one more gets 429; default: 1024",
    )
    _add_settings(parser, "such as engine.max_num_seqs=8 or ingress.num_replicas=2")


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = commands.add_parser(
        "chat",
        help="chat with a server's model",
        description="Chats in the terminal. Ctrl-C stops an answer; /help lists what else to type.",
    )
    _add_server(chat)
    chat.add_argument("--system", metavar="TEXT", help="system message")
    _add_sampling(chat, None)


def _add_complete(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    complete = commands.add_parser(
        "complete",
        help="complete a text",
        description="Writes the completion of a prompt to stdout as it comes.",
    )
    complete.add_argument(
        "prompt", metavar="PROMPT", help="text to complete; - reads it from stdin"
    )
    _add_server(complete)
    complete.add_argument(
        "--offline", metavar="MODEL", help="run this model in this process instead"
    )
    _add_sampling(complete, 256)


def _add_batch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    batch = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answers OpenAI's batch files, with an engine in this process or by a server. "
        "What OUT already answers is not asked again.",
    )
    batch.add_argument("input", type=Path, metavar="IN", help="requests, a JSON object a line")
    batch.add_argument("output", type=Path, metavar="OUT", help="answers, likewise; is added to")
    batch.add_argument("--url", help="server to ask; default: run the model in this process")
    batch.add_argument("--model", help="model to run in this process; default: the bundled one")
    _add_settings(batch, "such as engine.max_num_seqs=64")
    batch.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="requests under way at once; default: 32 on a server, 256 in this process",
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help="of the server; default: %(default)s")
    parser.add_argument("--model", help="default: the first that is served")


def _add_sampling(parser: argparse.ArgumentParser, max_tokens: int | None) -> None:
    longest = "no limit" if max_tokens is None else str(max_tokens)
    parser.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help=f"default: {longest}"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    parser.add_argument("--seed", type=int, metavar="N", help="fixes the answer")


def _add_settings(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help=f"a setting, {example}; may be repeated",
    )


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value
