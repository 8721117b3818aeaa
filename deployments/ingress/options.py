"""Options of the HTTP side."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from deployments.api_keys import KEY_VARIABLES, KeySource, keys_in_environment
from deployments.plugins.loading import by_class_name
from engine.errors import ConfigError
from engine.options import Options


class IngressOptions(Options):
    """The HTTP side."""

    num_replicas: int = Field(default=1, ge=1)
    """Processes that answer HTTP. One is one core, and enough for an engine or two."""
    num_cpus: float = Field(default=0.1, ge=0)
    """CPUs that Ray counts as taken by an ingress replica."""
    max_concurrent_requests: int = Field(default=1024, ge=1)
    """Completions under way in one ingress replica; one more gets 429 at once."""
    retry_after_s: int = Field(default=1, ge=1)
    """`Retry-After` of such an answer, in seconds."""
    api_keys_file: str | None = None
    """File of the keys that clients must send one of, on each node with an ingress replica; see
    `read_key_file`. Keys may also come from the environment, see `KEY_VARIABLES`; with neither,
    everybody is let in."""
    require_api_key: bool = False
    """Whether an ingress without any key refuses to start: for keys that come from the environment
    of the nodes, where they may be forgotten."""
    max_concurrent_requests_per_key: int | None = Field(default=None, ge=1)
    """Completions of one key under way in one ingress replica, where requests for something else
    count as one; one more gets 429. A key in the file may have a limit of its own. None sets no
    limit."""
    requests_per_minute_per_key: float | None = Field(default=None, gt=0)
    """Requests of one key that one ingress replica takes in a minute, likewise."""
    cors_allow_origins: list[str] = Field(default_factory=list)
    """Web pages that may call this server from a browser, such as `https://chat.example.com`; `*`
    means any."""
    allowed_hosts: list[str] = Field(default_factory=list)
    """Names besides localhost and loopback addresses by which requests may call a server that
    listens on the loopback and asks for no keys, such as that of a proxy on the same machine.
    Others are refused: any web page can have its own name lead to its visitor's loopback."""
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    """Longest request body; a longer one gets 413."""
    max_held_body_bytes: int = Field(default=512 * 2**20, ge=1024)
    """Of all bodies together that an ingress replica reads, or handles until the answer begins; a
    request beyond it gets 429."""
    body_timeout_s: float = Field(default=60, gt=0)
    """How long a client may take to send its body; a slower one gets 408."""
    allow_request_chat_templates: bool = False
    """Whether clients may send a `chat_template`. It is a program that runs in the ingress, for as
    long as it likes: only for clients that are trusted."""
    response_cache_bytes: int = Field(default=0, ge=0)
    """Memory for answers to greedy and seeded requests, which whoever sent them gets again: of each
    model, in one ingress replica. 0 keeps none."""
    allowed_classes: list[str] = Field(default_factory=list)
    """Protocol plug-ins that `class_name` of a model may name, as `package.module:Class`. They run
    in the ingress: nothing that is not listed here is imported."""
    graceful_shutdown_timeout_s: float = Field(default=600, ge=0)
    """Longest stream that an update of the ingress waits for."""
    failover_timeout_s: float = Field(default=120, ge=0)
    """How long a request whose engine was lost may wait for its next token, a new engine's start
    included, before its client gets an error."""
    failover_tries: int = Field(default=3, ge=0)
    """Tries in a row that may bring next to nothing before its client gets an error: a request that
    breaks engines must not break all of them."""

    @field_validator("cors_allow_origins")
    @classmethod
    def _are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", origin):
                raise ValueError(
                    f"'{origin}' is no origin; write it as browsers do, such as "
                    "https://chat.example.com, or * for all."
                )
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: list[str]) -> list[str]:
        for host in hosts:
            if not re.fullmatch(r"[a-z0-9._-]+", host):
                raise ValueError(
                    f"'{host}' is no host; write its name alone, in small letters and without a "
                    "port, such as llm.example.com."
                )
        return hosts

    @field_validator("allowed_classes")
    @classmethod
    def _are_classes(cls, paths: list[str]) -> list[str]:
        by_class_name(paths)
        return paths

    @model_validator(mode="after")
    def _longest_body_fits(self) -> IngressOptions:
        if self.max_body_bytes > self.max_held_body_bytes:
            raise ValueError("max_held_body_bytes must be at least max_body_bytes.")
        return self

    def check(self) -> IngressOptions:
        """Find out now what would else fail in every replica.

        Returns:
            The options; with `require_api_key`, if keys are in this process's environment: they
            may be missing in the environment of the cluster, which must not open the server.

        Raises:
            ConfigError: there is something wrong with the API keys.
        """
        options = self
        if keys_in_environment():
            options = self.model_copy(update={"require_api_key": True})
        options.key_source()
        return options

    @property
    def has_keys(self) -> bool:
        """Whether clients must send an API key."""
        return self.api_keys_file is not None or keys_in_environment()

    def key_source(self) -> KeySource | None:
        """The API keys, or None for a server without.

        Raises:
            ConfigError: there is something wrong with them.
        """
        if self.has_keys:
            return KeySource(self.api_keys_file)
        if self.require_api_key:
            raise ConfigError(
                "there are no API keys here: set ingress.api_keys_file, or "
                f"{KEY_VARIABLES[0]} in the environment of every node before Ray starts."
            )
        return None
