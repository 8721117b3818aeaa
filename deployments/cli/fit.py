"""Where a cluster would put what an application starts."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node

from deployments.cli.errors import CommandError

CONNECT_S = 5.0
"""How long a cluster may take to accept a connection."""

Resources = Mapping[str, float]


@dataclass(slots=True, frozen=True)
class Item:
    """Something that runs on one node."""

    name: str
    needs: Resources


def free_resources(address: str) -> dict[str, Resources]:
    """What each node of a Ray cluster has free now, by the node's address.

    Raises:
        CommandError: there is no such cluster.
    """
    try:
        _check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(
            f"no Ray cluster answers at {address} ({reason}). One that asks for tokens wants "
            "RAY_AUTH_MODE=token in the environment here too."
        ) from None
    free = available_resources_per_node()
    return {
        node["NodeManagerAddress"]: free.get(node["NodeID"], {})
        for node in ray.nodes()
        if node["Alive"]
    }


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at host:port: Ray would try for minutes, and tell nobody."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "//" not in address:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


def place(items: Sequence[Item], nodes: Mapping[str, Resources]) -> dict[str, str | None]:
    """Put each item, in order, on the first node with room for it.

    Ray itself prefers some nodes to others, but finds room where this does: what differs is which
    node, and now and then whether the last of many items still fits.

    Returns:
        Name of the item → node, or None when it would wait.
    """
    free = {node: dict(resources) for node, resources in nodes.items()}
    places: dict[str, str | None] = {}
    for item in items:
        node = next((n for n, has in free.items() if _fits(item.needs, has)), None)
        places[item.name] = node
        if node is not None:
            for resource, amount in item.needs.items():
                free[node][resource] = free[node].get(resource, 0.0) - amount
    return places


def _fits(needs: Resources, has: Resources) -> bool:
    # Ray counts in ten-thousandths.
    return all(has.get(name, 0.0) + 1e-4 / 2 > amount for name, amount in needs.items())
