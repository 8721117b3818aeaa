"""PromQL of what the panels ask for, narrowed down by the dashboard's variables."""

from __future__ import annotations

PREFIX = "ray_trunkline_"
"""Of the names that Ray exports."""
MODEL = 'model_name=~"$model"'
"""Selects the models asked for."""
ENGINE = MODEL + ', deployment=~"$deployment"'
"""Selects the engines asked for."""
_QUANTILES = (0.5, 0.95, 0.99)
_BY_ENGINE = "sum by (model_name, replica)"


def counted(name: str, by: str = "", more: str = "") -> str:
    """How much a counter of ingress replicas grows in a second, all together or by labels."""
    return f"sum{_by(by)} (rate({PREFIX}{name}{{{more}}}[$__rate_interval]))"


def by_model(name: str, by: str = "", more: str = "") -> str:
    """The same of the models asked for."""
    return counted(name, by, f"{MODEL}, {more}" if more else MODEL)


def by_engine(name: str) -> str:
    """How much a counter of each engine grows in a second."""
    return f"{_BY_ENGINE} (rate({PREFIX}{name}{{{ENGINE}}}[$__rate_interval]))"


def engines(name: str, how: str = _BY_ENGINE) -> str:
    """A gauge of the engines."""
    return f"{how} ({PREFIX}{name}{{{ENGINE}}})"


def quantile(share: float, name: str) -> str:
    """A quantile of a histogram, over all models asked for."""
    return f"histogram_quantile({share}, {by_model(f'{name}_bucket', 'le')})"


def quantiles(name: str) -> dict[str, str]:
    """The usual ones."""
    return {f"p{share * 100:g}": quantile(share, name) for share in _QUANTILES}


def share(part: str, whole: str) -> str:
    """One rate over another; nothing while the other is 0."""
    return f"{part} / ({whole} > 0)"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def idle_share() -> str:
    """Of each engine; the counter of one that has just come may not have two values yet."""
    return f"clamp_max({by_engine('device_idle_seconds_total')}, 1)"
