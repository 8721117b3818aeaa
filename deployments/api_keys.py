"""API keys: where they come from, and who holds one. A key itself is never kept, only its hash."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from engine.errors import ConfigError

logger = logging.getLogger("ray.serve")

KEY_VARIABLES = ("TRUNKLINE_API_KEYS", "VLLM_API_KEY")
"""Variables of the environment that may hold keys: several, separated by commas, or a single one.
The second is vLLM's own, so that a server that was closed there is not open here."""
CHECK_PERIOD_S = 5.0
"""How often it is looked whether the file of keys has changed."""
_COMMENT = re.compile(r"(?:^|\s)#")
"""How one begins: a `#` within a word belongs to the key, of which a part must not be one too."""


class ApiKey(msgspec.Struct, frozen=True):
    """What is known of a key.

    Attributes:
        digest: SHA-256 of the key.
        name: who holds it, for messages; may be empty.
        max_concurrent_requests: completions under way at once in an ingress replica; None: the
            common limit.
        requests_per_minute: that an ingress replica takes; None: the common limit.
    """

    digest: bytes
    name: str = ""
    max_concurrent_requests: int | None = None
    requests_per_minute: float | None = None


class KeySource:
    """The keys of the environment and of the file, which is read again when it changes.

    Args:
        path: of the file; None when there is none.
        environment: where `KEY_VARIABLES` are looked up.
        now: clock, in seconds.

    Raises:
        ConfigError: the file cannot be read, others may read it, or a line of it is wrong; or a
            variable is set and holds no key.
    """

    def __init__(
        self,
        path: str | None,
        environment: Mapping[str, str] = os.environ,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._now = now
        self._fixed = _keys_of_environment(environment)
        self._checked = now()
        self._stamp = self._file_stamp()
        self.keys = self._read()
        """All keys, by their digests."""

    def find(self, key: bytes) -> ApiKey | None:
        """The key that this is, or None; takes as long for a wrong key as for a right one.

        Hashes are compared instead of keys, so that times tell nothing of lengths either.
        """
        self._follow_file()
        digest = hashlib.sha256(key).digest()
        found = None
        for known in self.keys.values():
            if hmac.compare_digest(known.digest, digest):
                found = known
        return found

    def _follow_file(self) -> None:
        """Read the file again when it has changed; a wrong one changes nothing."""
        now = self._now()
        if self._path is None or now - self._checked < CHECK_PERIOD_S:
            return
        self._checked = now
        try:
            stamp = self._file_stamp()
            if stamp != self._stamp:
                self._stamp = stamp
                self.keys = self._read()
                logger.info("read the API keys again: there are %d", len(self.keys))
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)

    def _file_stamp(self) -> tuple[int, ...]:
        """Differs when the file has been written or replaced."""
        if self._path is None:
            return ()
        try:
            state = self._path.stat()
        except OSError as error:
            raise _unreadable(self._path, error) from None
        return (state.st_ino, state.st_mtime_ns, state.st_size, state.st_mode)

    def _read(self) -> dict[bytes, ApiKey]:
        keys = {key.digest: key for key in self._fixed}
        if self._path is not None:
            keys |= {key.digest: key for key in read_key_file(self._path)}
        return keys


def keys_in_environment(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a variable for keys is set."""
    return any(name in environment for name in KEY_VARIABLES)


def read_key_file(path: Path) -> list[ApiKey]:
    """Read a file with a key on each line, which settings and a comment may follow, as in

        # key                 settings
        sk-0c9a24b1ce         name=alice requests_per_minute=600 max_concurrent_requests=32

    Raises:
        ConfigError: it cannot be read, others may read it, it holds no key, or a line is wrong.
    """
    try:
        if path.stat().st_mode & 0o007:
            raise ConfigError(
                f"the file of API keys {path} is open to everybody on its machine; say "
                f"`chmod 600 {path}` (a Kubernetes secret: defaultMode: 0400)."
            )
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    keys: dict[bytes, ApiKey] = {}
    for number, line in enumerate(lines, 1):
        words = _COMMENT.split(line, maxsplit=1)[0].split()
        if not words:
            continue
        try:
            key = _parse(words)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        if key.digest in keys:
            raise ConfigError(f"{path}, line {number}: this key has been there before.")
        keys[key.digest] = key
    if not keys:
        raise ConfigError(f"the file of API keys {path} holds no key; write one on a line.")
    return list(keys.values())


def _unreadable(path: Path, error: Exception) -> ConfigError:
    why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
    return ConfigError(f"cannot read the file of API keys {path}: {why}.")


def _parse(words: list[str]) -> ApiKey:
    """A key and its settings; errors do not repeat the key."""
    key, *settings = words
    values: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in ApiKey.__struct_fields__[1:] or name in values:
            known = ", ".join(f"{field}=…" for field in ApiKey.__struct_fields__[1:])
            raise ValueError(f"after the key there may be {known}, each once.")
        values[name] = value
    try:
        parsed = msgspec.convert({"digest": _digest(key), **values}, ApiKey, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{error}.") from None
    for limit in (parsed.max_concurrent_requests, parsed.requests_per_minute):
        if limit is not None and not 0 < limit < 10**9:
            raise ValueError("limits must be above 0.")
    return parsed


def _keys_of_environment(environment: Mapping[str, str]) -> list[ApiKey]:
    """The keys of all variables; one that is set and empty is an error, not an open server."""
    many, single = (environment.get(name) for name in KEY_VARIABLES)
    keys = [] if many is None else [key.strip() for key in many.split(",")]
    keys += [] if single is None else [single.strip()]
    if not all(keys):
        raise ConfigError(
            f"{' and '.join(KEY_VARIABLES)} must not hold empty keys; unset them to take requests "
            "without a key."
        )
    return [ApiKey(_digest(key)) for key in keys]


def _digest(key: str) -> bytes:
    if not key.isascii() or not key.isprintable():
        raise ConfigError("API keys must be of printable ASCII characters.")
    return hashlib.sha256(key.encode()).digest()
