"""Options of an application: models, their deployments, and with the ingress's all together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from deployments.arguments import into_engine, with_models
from deployments.ingress.options import IngressOptions
from deployments.observability.options import LoggingOptions, TracingOptions
from deployments.placement import AFFINITY_MARGIN
from deployments.plugins.loading import PluginClass, load_classes
from deployments.protocols.reasoning import REASONING_PARSERS
from deployments.protocols.tool_parsers import TOOL_CALL_PARSERS
from engine.chat_template import ChatTemplate
from engine.config import EngineConfig
from engine.embedding import Pooling
from engine.errors import ConfigError, InvalidRequest
from engine.model_config import read_model_config
from engine.model_source import resolve_model, weight_files
from engine.options import Options
from engine.parallel.share import share_of


class Autoscaling(Options):
    """How many engines a model gets as load comes and goes; see `cluster/autoscaling.py`."""

    min_replicas: int = Field(default=1, ge=0)
    """Fewest engines; with 0 a request may have to wait for the start of the first."""
    max_replicas: int = Field(default=2, ge=1)
    """Most engines."""
    initial_replicas: int | None = Field(default=None, ge=0)
    """Engines at the start, and again after each change of the model's configuration; None takes
    `min_replicas`, and keeps the engines that there are."""
    target_ttft_s: float = Field(default=2.0, gt=0)
    """Time to the first token, in the engine, that 95 % of the requests should stay below; while it
    is exceeded there are more engines, up to twice as many as are needed for `target_use`."""
    target_use: float = Field(default=0.7, gt=0, le=1)
    """Share of the engines' rows, of their KV cache and of the prompt tokens that they can compute
    that should be in use. What is left takes up bursts while more engines start."""
    upscale_delay_s: float = Field(default=3, ge=0)
    """How long more engines must have been wanted before they are started."""
    downscale_delay_s: float = Field(default=300, ge=0)
    """How long fewer must have been wanted before some, or the last one, are given up, which means
    loading a model again. A start-up should not take longer."""
    metrics_interval_s: float = Field(default=1, gt=0, le=5)
    """How often engines report to Serve what this is decided from; what they told over 10 s ago is
    not heeded."""

    @model_validator(mode="after")
    def _in_order(self) -> Autoscaling:
        least, first, most = self.min_replicas, self.initial_replicas, self.max_replicas
        if least > most:
            raise ValueError(f"min_replicas ({least}) is more than max_replicas ({most}).")
        if first is not None and not least <= first <= most:
            raise ValueError(
                f"initial_replicas ({first}) must be from min_replicas ({least}) to "
                f"max_replicas ({most})."
            )
        return self


class DeploymentOptions(Options):
    """How the engines of a model are deployed."""

    num_replicas: int = Field(default=1, ge=1)
    """Engines, when `autoscaling` is not given."""
    autoscaling: Autoscaling | None = None
    """How the number of engines follows the load; None keeps it at `num_replicas`."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs of an engine; None takes `tensor_parallel_size` when the engine runs on GPUs."""
    num_cpus: float = Field(default=0.5, ge=0)
    """CPUs that Ray counts as taken by an engine when it places others; how many threads the engine
    computes with is `cpu_threads`, whatever this is."""
    accelerator_type: str | None = None
    """Such as `A100`: places the engines on nodes with this accelerator."""
    max_ongoing_requests: int | None = Field(default=None, ge=1)
    """Requests an engine holds, running and waiting; None takes twice `max_num_seqs`, so that the
    engine always has the next batch at hand. (Serve's default is 5.)"""
    max_queued_requests: int = Field(default=1024, ge=-1)
    """Requests that an ingress replica holds back when all engines are full, before it answers
    503. It must exceed a burst: Serve counts requests here while it routes them."""
    max_queued_tokens: int | None = Field(default=None, ge=0)
    """Prompt tokens that may wait for computation on the engine with the fewest; while there are
    more, requests get 429. None sets no limit."""
    max_estimated_wait_s: float | None = Field(default=None, ge=0)
    """How long a request may have to wait for its first token, estimated from how fast the queues
    have moved lately; while it is longer, requests get 429. None sets no limit."""
    max_logprobs_under_way: int = Field(default=2**22, ge=1)
    """Log-probabilities, alternatives included, that the requests under way in one ingress replica
    may come to; one that would exceed it gets 429. Each takes about half a kilobyte there, and
    requests without a `max_tokens` count as the longest that the model takes."""
    routing_policy: Literal["prefix_load", "round_robin", "power_of_two"] = "prefix_load"
    """How an engine is chosen for a request: by what it has to compute before the first token, in
    turn, or the less loaded of two drawn at random. The latter two are for comparison: they do not
    look at caches."""
    cache_affinity_margin: float = Field(default=AFFINITY_MARGIN, ge=0)
    """How many more requests than the mean an engine may have, as a share of the mean, and still be
    given requests because the beginning of their prompts is in its cache."""
    graceful_shutdown_timeout_s: float = Field(default=600, ge=0)
    """Longest generation that a downscale or update waits for. Serve's 20 s would cut streams."""
    health_check_period_s: float = Field(default=5, gt=0)
    """A dead engine ends its replica at once; this is for hung ones. (Serve's default is 10.)"""
    health_check_timeout_s: float = Field(default=10, gt=0)
    """The replica does no heavy work, so an answer takes milliseconds. (Serve's default is 30.)"""
    stall_limit_s: float | None = Field(default=None, ge=0)
    """An engine whose step lasts longer, without compiling anything, is taken to hang and replaced.
    None takes at least 8 s on a GPU, and at least 60 s on a CPU; see `stall_limit` in
    `deployments/watchdog.py`. 0 is for debuggers: neither an engine nor its replica is ended then
    for standing still."""
    crash_dump_dir: str | None = None
    """Folder for what an engine leaves when it dies; None takes that of Ray's logs."""

    @model_validator(mode="after")
    def _one_size(self) -> DeploymentOptions:
        if self.autoscaling is not None and self.num_replicas > 1:
            raise ValueError(
                f"num_replicas ({self.num_replicas}) has no effect beside autoscaling; set "
                "autoscaling.initial_replicas, or leave it out."
            )
        return self


class ModelOptions(Options):
    """One served model.

    `model_path` and `max_model_len` may stand here too: they are `engine.model` and
    `engine.max_model_len`.
    """

    engine: EngineConfig = Field(default_factory=lambda: EngineConfig.parse({}))
    """The engine of each replica."""
    deployment: DeploymentOptions = DeploymentOptions()
    """How many engines, on what, and what may wait for them."""
    tool_call_parser: str | None = None
    """How the model writes calls of functions: `hermes`, which is Qwen's form too, or
    `llama3_json`. None guesses it from the chat template; where it says nothing, calls stay in
    the text."""
    reasoning_parser: str | None = None
    """How the model writes what it thinks: `qwen3` or `deepseek_r1`. It then comes as
    `reasoning_content`. None leaves it in the text."""
    pooling: Pooling = "last"
    """How hidden states become an embedding: that of the last token, or the mean of all."""
    class_name: str | None = None
    """Class of the protocol plug-in that serves the model beside the paths that every model has; it
    must be one of `ingress.allowed_classes`."""
    chat_template: str | None = Field(default=None, min_length=1)
    """Chat template in place of the model's own: Jinja source, or the path of a file of it on each
    node with an ingress replica."""
    response_role: str = Field(default="assistant", min_length=1)
    """`role` of the messages that chats are answered with."""

    @model_validator(mode="before")
    @classmethod
    def _into_engine(cls, values: Any) -> Any:
        return into_engine(values) if isinstance(values, dict) else values

    @field_validator("tool_call_parser", "reasoning_parser")
    @classmethod
    def _is_known(cls, name: str | None, info: ValidationInfo) -> str | None:
        known = TOOL_CALL_PARSERS if info.field_name == "tool_call_parser" else REASONING_PARSERS
        if name is not None and name not in known:
            raise ValueError(f"there is no '{name}'; take one of {', '.join(known)}.")
        return name

    def check(self) -> None:
        """Find out now what would else fail in every replica, again and again.

        Raises:
            ConfigError: the model is not there, or only half, or an option does not fit it.
        """
        self.own_chat_template()
        self._check_gpus()
        source = resolve_model(self.engine.model)
        shape = read_model_config(source)
        self.engine.resolve_max_model_len(shape.max_position_embeddings)
        share_of(shape, self.engine.tensor_parallel_size)
        if source.kind == "directory" and self.engine.load_format != "dummy":
            weight_files(source.path)

    def _check_gpus(self) -> None:
        ranks, num_gpus = self.engine.tensor_parallel_size, self.deployment.num_gpus
        if ranks > 1 and num_gpus not in (None, 0, ranks):
            raise ConfigError(
                f"deployment.num_gpus is {num_gpus:g}, but each of tensor_parallel_size = {ranks} "
                "ranks takes a GPU of its own; leave it out."
            )

    def own_chat_template(self) -> str | None:
        """The source of `chat_template`, or None where the model's own is to be used.

        Raises:
            ConfigError: it is neither valid Jinja nor a file of that.
        """
        source = self.chat_template
        if source is None:
            return None
        try:
            if "{{" not in source and "{%" not in source:
                source = Path(source).expanduser().read_text()
            ChatTemplate(source)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(
                f"chat_template '{self.chat_template}' cannot be read ({reason}); give a file, or "
                "Jinja source."
            ) from None
        except InvalidRequest as error:
            raise ConfigError(error.message) from None
        return source


class AppArgs(Options):
    """Arguments of `deployments.app:build`.

    Either `models`, or the shortcut for a single one: `model` (its name or path), and what
    `ModelOptions` takes. On the command line nested options are dotted: `engine.max_num_seqs=8`.
    """

    models: dict[str, ModelOptions] = Field(min_length=1)
    """Name that clients use → model."""
    ingress: IngressOptions = IngressOptions()
    """The HTTP side."""
    logging: LoggingOptions = LoggingOptions()
    """What all processes log, and where to."""
    tracing: TracingOptions = TracingOptions()
    """OpenTelemetry traces of requests."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return with_models(values, ModelOptions.model_fields)

    @model_validator(mode="after")
    def _distinct(self) -> AppArgs:
        for name in self.models:
            if not name.strip() or not name.isprintable():
                raise ValueError(f"{name!r} is no name for a model; take one that can be read.")
        names = [deployment_name(name) for name in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two served names give the same deployment name '{name}'")
        return self

    def check(self) -> AppArgs:
        """Find out now what would else fail in every replica.

        Returns:
            The arguments, see `IngressOptions.check`.

        Raises:
            ConfigError: an option does not fit, a model is not there, or a plug-in cannot be used.
        """
        for name, options in self.models.items():
            try:
                options.check()
            except ConfigError as error:
                raise ConfigError(f"models.{name}: {error}") from None
        self.plugin_classes()
        self.logging.check()
        self.tracing.check()
        return self.model_copy(update={"ingress": self.ingress.check()})

    def plugin_classes(self) -> dict[str, PluginClass]:
        """Served name → class of the plug-in, of the models that have one.

        Raises:
            ConfigError: a class is not on the allow-list, or cannot be used.
        """
        names = {name: options.class_name for name, options in self.models.items()}
        return load_classes(names, self.ingress.allowed_classes)


def deployment_name(served_name: str) -> str:
    """Name of a model's engine deployment, as the Ray dashboard shows it."""
    return "Engine-" + "".join(c if c.isalnum() or c in "-_." else "-" for c in served_name)
