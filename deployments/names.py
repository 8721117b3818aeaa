"""Names by which processes of one application find each other."""

from __future__ import annotations

SERVE_NAMESPACE = "serve"
"""Ray namespace that Serve's actors, and with them the engine actors, live in."""

INGRESS = "Ingress"
"""Name of the deployment that speaks HTTP."""


def engine_actor_name(replica_id: str) -> str:
    """Name of the engine actor that belongs to the Serve replica with this unique id."""
    return f"trunkline-engine-{replica_id}"
