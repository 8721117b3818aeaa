"""The panels of the dashboard, row by row: what each asks Prometheus, and what it tells."""

from __future__ import annotations

from typing import NamedTuple

from cluster.monitoring.queries import (
    MODEL,
    PREFIX,
    by_engine,
    by_model,
    counted,
    engines,
    idle_share,
    quantile,
    quantiles,
    share,
)

BROKEN = 'status=~"5.."'
EACH = "{{replica}}"
"""Legend of what is shown of each engine; with the models' names it would take half a panel."""
BY_STATUS = (
    ("/^2/", "green"),
    ("/^4/", "yellow"),
    ("/^429/", "orange"),
    ("/^499/", "purple"),
    ("/^5/", "red"),
)


class Panel(NamedTuple):
    """A panel."""

    title: str
    says: str
    """What it means, and what to do."""
    unit: str
    """Grafana's name of it."""
    queries: dict[str, str]
    """Legend → PromQL."""
    number: bool = False
    """Whether it is one number, with a small graph behind it, and no graph."""
    limits: tuple[float, ...] = ()
    """From where on a number is orange and red, or where a graph has a red line."""
    stacked: bool = False
    colors: tuple[tuple[str, str], ...] = ()
    """Regular expression of legends → color, in shades if there are several of them."""


NOW = (
    Panel(
        "Requests a second",
        "Answered over HTTP, refused ones included, of all models.",
        "reqps",
        {"": counted("http_requests_total")},
        number=True,
    ),
    Panel(
        "Server errors",
        "Share of answers with a status of 500 and above. Which: Refusals and errors, below.",
        "percentunit",
        {"": share(counted("http_requests_total", "", BROKEN), counted("http_requests_total"))},
        number=True,
        limits=(0.005, 0.02),
    ),
    Panel(
        "Time to first token, p95",
        "Of requests that have ended. Above target: see Where the time goes.",
        "s",
        {"": quantile(0.95, "time_to_first_token_seconds")},
        number=True,
        limits=(2, 5),
    ),
    Panel(
        "Inter-token latency, p95",
        "Between two messages of a stream.",
        "s",
        {"": quantile(0.95, "inter_token_latency_seconds")},
        number=True,
        limits=(0.1, 0.25),
    ),
    Panel(
        "KV cache, fullest engine",
        "Near 100 % new requests wait, and running ones may be pushed out.",
        "percentunit",
        {"": engines("kv_cache_usage_perc", "max")},
        number=True,
        limits=(0.85, 0.95),
    ),
    Panel(
        "Event loop lag, worst",
        "All streams of a process pause for as long.",
        "s",
        {"": f"max ({PREFIX}event_loop_lag_seconds)"},
        number=True,
        limits=(0.1, 0.5),
    ),
)
TRAFFIC = (
    Panel(
        "Answers by status",
        "Of all models. 499: the client left before the end.",
        "reqps",
        {"{{status}}": f"{counted('http_requests_total', 'status')} > 0"},
        stacked=True,
        colors=BY_STATUS,
    ),
    Panel(
        "Refusals and errors by reason",
        "What docs/operations.md says of each reason.",
        "reqps",
        {
            "{{status}} {{reason}}": counted("http_requests_total", "status, reason", 'reason!=""')
            + " > 0"
        },
        stacked=True,
        colors=BY_STATUS,
    ),
    Panel(
        "Completions by how they ended",
        "abort: the client left or was refused. error: lost with an engine, or the server's fault.",
        "reqps",
        {"{{finished_reason}}": by_model("request_success_total", "finished_reason") + " > 0"},
        stacked=True,
        colors=(("error", "red"), ("abort", "orange"), ("stop", "green"), ("length", "blue")),
    ),
    Panel(
        "Tokens a second",
        "Prompt tokens computed or found in a cache, and tokens generated.",
        "short",
        {
            "prompt": by_model("prompt_tokens_total"),
            "generated": by_model("generation_tokens_total"),
        },
    ),
)
LATENCY = (
    Panel(
        "Time to first token",
        "From the last byte of the request to its first token.",
        "s",
        quantiles("time_to_first_token_seconds"),
        limits=(5,),
    ),
    Panel(
        "Inter-token latency",
        "Between two messages of a stream; its tail is what readers see as stutter.",
        "s",
        quantiles("inter_token_latency_seconds"),
        limits=(0.25,),
    ),
    Panel(
        "End to end",
        "To the last token. Follows the length of answers.",
        "s",
        quantiles("e2e_request_latency_seconds"),
    ),
    Panel(
        "Where the time goes, p95",
        "queue: everything before its first token that is not its own prefill. Queue up: more "
        "engines. Prefill up: longer prompts or fewer prefix hits. Decode up: longer answers or "
        "slower steps.",
        "s",
        {
            stage: quantile(0.95, f"request_{stage}_time_seconds")
            for stage in ("queue", "prefill", "decode")
        },
    ),
)
LOAD = (
    Panel("Running", "Requests in the batch, by engine; other panels name engines alone.", "short",
          {"{{model_name}} {{replica}}": engines("num_requests_running")}, stacked=True),
    Panel("Waiting", "Requests that wait for rows or blocks, by engine, or for one.", "short",
          {EACH: engines("num_requests_waiting"),
           "before the engines": f"sum({PREFIX}num_requests_held{{{MODEL}}})"}, stacked=True),
    Panel(
        "Tokens generated a second, by engine",
        "Uneven for long: see the KV cache, and Routing in docs/serving.md.",
        "short",
        {EACH: by_engine("generation_tokens_total")},
    ),
    Panel(
        "Time of a step",
        "Of the time that the device had work. It grows with the batch and with prefill.",
        "s",
        {EACH: f"(1 - {idle_share()}) / ({by_engine('num_steps_total')} > 0)"},
    ),
)  # fmt: skip
CACHES = (
    Panel("KV cache in use", "By engine; blocks that only a cache holds are free.", "percentunit",
          {EACH: engines("kv_cache_usage_perc")}),
    Panel(
        "Prompt tokens found in the prefix cache",
        "Share by engine. A drop costs prefill: chats that move, or caches that are too small.",
        "percentunit",
        {
            EACH: share(
                by_engine("prefix_cache_hits_total"), by_engine("prefix_cache_queries_total")
            )
        },
    ),
    Panel(
        "Prompts answered from the response cache",
        "Share; there is one only with ingress.response_cache_bytes.",
        "percentunit",
        {
            "": share(
                by_model("response_cache_hits_total"), by_model("response_cache_queries_total")
            )
        },
    ),
    Panel(
        "Length of requests",
        "Tokens; sizing follows from these.",
        "short",
        {
            "prompt p50": quantile(0.5, "request_prompt_tokens"),
            "prompt p95": quantile(0.95, "request_prompt_tokens"),
            "generated p50": quantile(0.5, "request_generation_tokens"),
            "generated p95": quantile(0.95, "request_generation_tokens"),
        },
    ),
)  # fmt: skip
FAILURES = (
    Panel(
        "Engines that serve",
        "As each ingress sees it: its trunk is open and its steps go on.",
        "short",
        {"{{model_name}}": f"min by (model_name) ({PREFIX}num_engines{{{MODEL}}})"},
    ),
    Panel(
        "Failovers a minute",
        "Requests that went on elsewhere, as their engine was lost.",
        "short",
        {"{{model_name}}": "60 * " + by_model("num_failovers_total", "model_name")},
    ),
    Panel(
        "Preemptions a minute",
        "Requests pushed out for want of blocks, and computed anew.",
        "short",
        {EACH: "60 * " + by_engine("num_preemptions_total")},
    ),
    Panel(
        "Time since a step ended",
        "A second at most while an engine lives; what grows hangs, and is ended.",
        "s",
        {EACH: engines("step_progress_age_seconds", "max by (model_name, replica)")},
        limits=(10,),
    ),
)
PLANE = (
    Panel(
        "Event loop lag",
        "Longest of ten seconds, by kind of process. An ingress that lags: more ingress replicas.",
        "s",
        {"{{process}}": f"max by (process) ({PREFIX}event_loop_lag_seconds)"},
        limits=(0.5,),
    ),
    Panel(
        "GPU idle",
        "Share of time in which no step was on the device: nothing to do, or between steps where "
        "none is launched ahead.",
        "percentunit",
        {EACH: idle_share()},
    ),
    Panel(
        "Node CPU",
        "In percent of a node's cores.",
        "percent",
        {"{{instance}}": "max by (instance) (ray_node_cpu_utilization)"},
    ),
    Panel(
        "Node memory",
        "In use, by node.",
        "bytes",
        {"{{instance}}": "max by (instance) (ray_node_mem_used)"},
    ),
)
ROWS = {
    "Now": NOW,
    "Traffic and errors": TRAFFIC,
    "Latency": LATENCY,
    "Load of the engines": LOAD,
    "KV cache and prefix cache": CACHES,
    "Failures": FAILURES,
    "Plane and GPU": PLANE,
}
"""Title → panels, from left to right."""
VARIABLES = {
    "model": f"label_values({PREFIX}num_engines, model_name)",
    "deployment": f'label_values({PREFIX}num_requests_running{{model_name=~"$model"}}, deployment)',
}
"""What the dashboard can be narrowed down to: name → Grafana's query for its values."""
