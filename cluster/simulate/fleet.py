"""Many cells, spread over the cores of this machine."""

from __future__ import annotations

import gc
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

from cluster.simulate.cell import Cell, CellSettings
from cluster.simulate.tally import Tally, add_up
from cluster.simulate.traces import Trace


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """A fleet and what it is to serve.

    Cells share nothing: a balancer before them sends each chat to one of them by a hash of its
    first words or its user, so that the parts of a Poisson stream are Poisson again.
    """

    cell: CellSettings
    """`num_engines` is the most that a cell has."""
    trace: Trace
    num_engines: int
    """Of all cells together; the last cells may have one less than the first."""
    requests: int
    rate: float
    """Mean requests a second and engine."""
    seed: int = 0
    max_tokens: int = 32768
    """Longest chat."""

    @property
    def num_cells(self) -> int:
        """As few as hold the engines."""
        return -(-self.num_engines // self.cell.num_engines)


def simulate(settings: FleetSettings, workers: int = 1) -> Tally:
    """Serve all requests; the figures do not depend on the number of worker processes."""
    run = partial(simulate_cell, settings)
    cells = range(settings.num_cells)
    if workers == 1:
        return add_up(map(run, cells))
    # Not forked: the caller may have threads, whose locks a fork would keep held for ever.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return add_up(pool.map(run, cells, chunksize=_chunk(len(cells), workers)))


def simulate_cell(settings: FleetSettings, number: int) -> Tally:
    """Serve the requests of one cell."""
    engines = share(settings.num_engines, settings.num_cells, number)
    first = sum_of_shares(settings.num_engines, settings.num_cells, number)
    begin, end = (settings.requests * n // settings.num_engines for n in (first, first + engines))
    rate = settings.rate * engines
    chats = settings.trace.chats(number, end - begin, rate, settings.seed, settings.max_tokens)
    gc.disable()  # nothing here is cyclic until the cell as a whole is dropped
    try:
        cell = replace(settings.cell, num_engines=engines)
        return Cell(cell, chats, (settings.seed, number)).run()
    finally:
        gc.enable()


def share(total: int, parts: int, number: int) -> int:
    """Size of one of `parts` parts of `total` that differ by one at most, larger ones first."""
    return total // parts + (number < total % parts)


def sum_of_shares(total: int, parts: int, number: int) -> int:
    """Size of all parts before that one."""
    return number * (total // parts) + min(number, total % parts)


def _chunk(cells: int, workers: int) -> int:
    """Few enough cells at a time that all workers end together."""
    return max(1, cells // (workers * 16))
