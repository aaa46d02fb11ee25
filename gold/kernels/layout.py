"""Index arrays on one device for the kernels: a byte plan with its trie, and the events of columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gold.bytes.events import EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gold.bytes.plan import BytePlan, Visits
    from gold.bytes.trie import ByteTrie


@dataclass(frozen=True)
class KeptEvents:
    """The columns of one side's rows that are separate events, in the order of ``ids``, and the ``stops``; all others
    of the ``width`` columns are ``left``."""

    ids: Tensor
    stops: Tensor
    width: int

    @cached_property
    def event(self) -> Tensor:
        """The event number of each column: those of ``ids``, then the stop event, then one for all ``left`` columns."""
        event = torch.full((self.width,), self.ids.numel() + 1, dtype=torch.int64, device=self.ids.device)
        event[self.stops] = self.ids.numel()
        event[self.ids] = torch.arange(self.ids.numel(), device=self.ids.device)
        return event

    @cached_property
    def left(self) -> Tensor:
        """The other columns, ascending."""
        return torch.nonzero(self.event > self.ids.numel())[:, 0]


@dataclass(frozen=True)
class Columns:
    """The event of each column of a row; ``events`` is their number."""

    event: Tensor
    events: int

    @cached_property
    def small(self) -> Tensor:
        """``event`` as int32."""
        return self.event.int()

    @cached_property
    def order(self) -> Tensor:
        """The columns sorted by event, ascending within each."""
        return torch.argsort(self.event, stable=True)

    @cached_property
    def starts(self) -> Tensor:
        """Start of each event in ``order``, then the number of columns."""
        counts = torch.bincount(self.event, minlength=self.events)
        return torch.cat((counts.new_zeros(1), torch.cumsum(counts, 0)))


@dataclass(frozen=True)
class Tokens:
    """Single tokens of some rows; ``moved``: the token is excluded from the sums of its row."""

    row: Tensor
    id: Tensor
    moved: Tensor


@dataclass(frozen=True)
class MassRanges:
    """Ranges of a pool of ids that make up the masses of a block of rows; a mass may consist of two ranges."""

    pool: Tensor
    low: Tensor
    high: Tensor
    mass: Tensor
    row: Tensor
    skips_target: Tensor
    masses: int


@dataclass(frozen=True)
class DeviceTrie:
    """A vocabulary's trie on a device, for rows of one width.

    ``pool`` holds every column once: text tokens in byte order, from ``texts`` on all columns that are neither text nor
    stop, from ``stop_low`` on the stop ids; ``position`` is its inverse. The other arrays are those of ``ByteTrie``.
    """

    texts: int
    stop_low: int
    pool: Tensor
    position: Tensor
    low: Tensor
    high: Tensor
    own: Tensor
    first_child: Tensor
    children: Tensor


class KernelTrie:
    """A vocabulary's byte trie for the kernels, with its tensors cached per device and row width."""

    def __init__(self, trie: ByteTrie) -> None:
        self.trie = trie
        self._on: dict[tuple[int, torch.device], DeviceTrie] = {}
        self._in_order: dict[int, KernelTrie] = {}

    def outside(self, width: int) -> NDArray[Any]:
        """Columns of rows ``width`` wide that are neither text nor stop: such ids, then columns beyond the
        vocabulary."""
        ids = self.trie.outside
        return np.concatenate((ids[: np.searchsorted(ids, width)], np.arange(self.trie.size, width)))

    def on(self, device: torch.device, width: int) -> DeviceTrie:
        """The trie on a device, for rows of ``width`` columns."""
        if (width, device) not in self._on:
            trie = self.trie
            pool = np.concatenate((trie.order, self.outside(width), trie.stops)).astype(np.int32)
            position = np.empty_like(pool)
            position[pool] = np.arange(width, dtype=np.int32)
            nodes = trie.low, trie.high, trie.own, trie.first_child, trie.children
            tensors = [torch.from_numpy(a).to(device) for a in (pool, position, *nodes)]
            self._on[width, device] = DeviceTrie(trie.order.size, width - trie.stops.size, *tensors)
        return self._on[width, device]

    def in_order(self, width: int) -> KernelTrie:
        """The trie for rows whose columns are permuted to the order of the pool."""
        if width not in self._in_order:
            trie, ids = self.trie, np.arange(width, dtype=np.int32)
            texts, stop_low = trie.order.size, width - trie.stops.size
            order, outside, stops = ids[:texts], ids[texts:stop_low], ids[stop_low:]
            trie = replace(trie, order=order, outside=outside, stops=stops, size=width)
            self._in_order[width] = KernelTrie(trie)
        return self._in_order[width]


@dataclass(frozen=True)
class DeviceVisits:
    """The visits of a plan on a device, and the visit of each mass."""

    ptr: Tensor
    row: Tensor
    node: Tensor
    starts: Tensor
    skips: Tensor
    mass_ptr: Tensor
    of_mass: Tensor

    @classmethod
    def of(cls, visits: Visits, masses: int, device: torch.device) -> DeviceVisits:
        """The visits on a device; together they yield ``masses`` masses."""

        def tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(array).to(device, dtype)

        ptr, mass_ptr = tensor(visits.ptr, torch.int64), tensor(visits.mass_ptr, torch.int64)
        number = torch.arange(mass_ptr.numel() - 1, dtype=torch.int32, device=device)
        row = torch.arange(ptr.numel() - 1, dtype=torch.int32, device=device)
        return cls(
            ptr=ptr,
            row=torch.repeat_interleave(row, ptr.diff(), output_size=number.numel()),
            node=tensor(visits.node, torch.int32),
            starts=tensor(visits.starts, torch.uint8),
            skips=tensor(visits.skips_target, torch.uint8),
            mass_ptr=mass_ptr,
            of_mass=torch.repeat_interleave(number, mass_ptr.diff(), output_size=masses),
        )


@dataclass(frozen=True)
class ByteLayout:
    """A byte plan on a device: the token sets over which each row's probabilities are summed, and the byte position and
    event of each sum.

    ``mass_cell`` is position · EVENTS + event; ``resolved`` marks the events of each position to which some mass
    belongs; the other arrays are those of ``bytes.plan.BytePlan``.
    """

    trie: KernelTrie
    visits: Visits
    device: torch.device
    target: Tensor
    mass_row: Tensor
    mass_cell: Tensor
    position_row: Tensor
    position_text: Tensor
    supervised: Tensor
    resolved: Tensor
    _device_visits: DeviceVisits | None = None

    @property
    def rows(self) -> int:
        """Number of model states of the batch."""
        return int(self.target.shape[0])

    @property
    def positions(self) -> int:
        """Number of byte positions of the batch."""
        return int(self.supervised.shape[0])

    @cached_property
    def stops(self) -> Tensor:
        """The stop ids."""
        return torch.from_numpy(self.trie.trie.stops).to(self.device, torch.int64)

    @cached_property
    def device_visits(self) -> DeviceVisits:
        """The visits on the device."""
        return self._device_visits or DeviceVisits.of(self.visits, self.mass_row.numel(), self.device)

    @classmethod
    def of(cls, trie: KernelTrie, plan: BytePlan, device: torch.device) -> ByteLayout:
        """The layout of a plan on a device."""

        def tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

        cell = plan.mass_position * EVENTS + plan.mass_event
        resolved = np.zeros(plan.positions * EVENTS, np.bool_)
        resolved[cell] = True
        return cls(
            trie,
            plan.visits,
            device,
            target=tensor(plan.target, torch.int64),
            mass_row=tensor(plan.mass_row, torch.int64),
            mass_cell=tensor(cell, torch.int64),
            position_row=tensor(plan.position_row, torch.int64),
            position_text=tensor(plan.position_text, torch.int64),
            supervised=tensor(plan.supervised, torch.bool),
            resolved=tensor(resolved.reshape(plan.positions, EVENTS), torch.bool),
        )

    def reaching(self, position: int, row: int) -> int:
        """How many rows before ``row``, the first that begins at ``position`` or later, are needed for that
        position."""
        earlier = np.flatnonzero(self.visits.reach[:row] >= position)
        return row - int(earlier[0]) if earlier.size else 0

    def window(self, positions: slice, rows: slice) -> tuple[ByteLayout, slice]:
        """The layout of a range of byte positions, renumbered from 0, and the rows it needs: ``rows``, which begin
        there, and earlier ones whose tokens can reach that far."""
        rows = slice(rows.start - self.reaching(positions.start, rows.start), rows.stop)
        visits, masses = self.visits.within(rows, positions)
        kept = masses if isinstance(masses, slice) else torch.from_numpy(masses).to(self.device)
        part = replace(
            self,
            visits=visits,
            target=self.target[rows],
            mass_row=self.mass_row[kept] - rows.start,
            mass_cell=self.mass_cell[kept] - positions.start * EVENTS,
            # A position after which nothing begins, and whose row is unused, may name a row before the first.
            position_row=(self.position_row[positions] - rows.start).clamp(min=0),
            position_text=self.position_text[positions],
            supervised=self.supervised[positions],
            resolved=self.resolved[positions],
            _device_visits=None,
        )
        return part, rows

    def mass_range(self, first_row: int, rows: int) -> tuple[int, int]:
        """First and one past the last mass of a block of rows."""
        first, last = self.visits.ptr[first_row], self.visits.ptr[first_row + rows]
        return int(self.visits.mass_ptr[first]), int(self.visits.mass_ptr[last])

    def in_order(self, width: int) -> tuple[Tensor, ByteLayout]:
        """The pool order of columns for rows ``width`` wide, and the layout for rows permuted to it: every set of
        tokens with a common prefix is then a range of columns."""
        here = self.trie.on(self.device, width)
        known = (self.target >= 0) & (self.target < width)
        target = torch.where(known, here.position.long()[torch.where(known, self.target, 0)], -1)
        layout = replace(
            self, trie=self.trie.in_order(width), target=target, _device_visits=self.device_visits
        )
        return here.pool.long(), layout

    def mass_ranges(self, first_row: int, rows: int, width: int) -> MassRanges:
        """The ranges of a block of rows over the pool of ``DeviceTrie``, for plain torch."""
        trie, visits = self.trie.trie, self.visits
        here = self.trie.on(self.device, width)
        first, last = visits.ptr[[first_row, first_row + rows]].tolist()
        node, starts, skips = (x[first:last] for x in (visits.node, visits.starts, visits.skips_target))
        row = visits.row[first:last] - first_row
        base = visits.mass_ptr[first:last] - visits.mass_ptr[first]

        children = trie.children[node].astype(np.int64)
        parent = np.repeat(np.arange(node.size), children)
        nth = np.arange(parent.size) - np.repeat(np.cumsum(children) - children, children)
        child = trie.first_child[node[parent]] + nth
        begun = np.flatnonzero(starts)
        texts, stop_low, end = (np.full(begun.size, x) for x in (here.texts, here.stop_low, width))
        columns = (
            (trie.low[node], trie.low[child], texts, stop_low),
            (trie.low[node] + trie.own[node], trie.high[child], stop_low, end),
            (base, base[parent] + 1 + nth, base[begun], base[begun] + 1 + children[begun]),
            (row, row[parent], row[begun], row[begun]),
            (skips, np.zeros(parent.size), skips[begun], np.zeros(begun.size)),
        )
        low, high, mass, in_row, skipping = (
            torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(self.device) for arrays in columns
        )
        masses = int(visits.mass_ptr[last] - visits.mass_ptr[first])
        return MassRanges(here.pool.long(), low, high, mass, in_row, skipping.bool(), masses)
