"""Index arrays on one device, as the kernels read them: a byte plan and its trie, events of columns."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

EVENTS = 258
"""Columns of a byte table: the 256 bytes, the stop event, and the rest."""
STOP_EVENT = 256
REST_EVENT = 257
_OF_VISITS = "visit_node", "visit_starts", "visit_skips_target"


@dataclass(frozen=True)
class KeptEvents:
    """Which columns of one side's rows are events of their own, in the order of ``ids``, and which are ``stops``; all
    others of the ``width`` are ``left``."""

    ids: Tensor
    stops: Tensor
    width: int

    @cached_property
    def place(self) -> Tensor:
        """For each column the number of its event: those of ``ids``, then the stop event, then all that is left."""
        place = torch.full((self.width,), self.ids.numel() + 1, dtype=torch.int64, device=self.ids.device)
        place[self.stops] = self.ids.numel()
        place[self.ids] = torch.arange(self.ids.numel(), device=self.ids.device)
        return place

    @cached_property
    def left(self) -> Tensor:
        """The other columns, ascending."""
        return torch.nonzero(self.place > self.ids.numel())[:, 0]


@dataclass(frozen=True)
class Columns:
    """Which of ``events`` events each column of a row belongs to."""

    is_special: Tensor
    events: int

    @cached_property
    def small(self) -> Tensor:
        """``is_special`` in 32 bits."""
        return self.is_special.int()

    @cached_property
    def order(self) -> Tensor:
        """The columns event by event, ascending within each."""
        return torch.argsort(self.is_special, stable=True)

    @cached_property
    def starts(self) -> Tensor:
        """Where in ``order`` each event begins, and the number of columns last."""
        counts = torch.bincount(self.is_special, minlength=self.events)
        return torch.cat((counts.new_zeros(1), torch.cumsum(counts, 0)))


@dataclass(frozen=True)
class Tokens:
    """Single tokens of some rows, and whether each counts by itself alone, not in the sums of its row."""

    row: Tensor
    id: Tensor
    moved: Tensor


@dataclass(frozen=True)
class Pieces:
    """Runs of a pool of ids that make up the masses of a block of rows; a mass may be made of two runs."""

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

    ``pool`` holds every column once: text tokens in byte order, from ``texts`` on all that is neither text nor stop,
    from ``stop_low`` on the stop ids; ``position`` is its inverse. The others are the trie's own arrays.
    """

    pool: Tensor
    position: Tensor
    low: Tensor
    high: Tensor
    own: Tensor
    first_child: Tensor
    children: Tensor
    texts: int
    stop_low: int


_DEVICE_TRIES: dict[tuple[int, int, torch.device], DeviceTrie] = {}
"""By identity of the trie's order, width and device; an entry lives as long as that array."""


_TRIES_IN_ORDER: dict[tuple[int, int], Mapping[str, NDArray[Any]]] = {}
"""Likewise, of rows whose columns stand in the order of the pool."""


@dataclass(frozen=True)
class Visits:
    """The visits of a plan on a device: row ``n`` has ``ptr[n] … ptr[n + 1]``, visit v the masses ``mass_ptr[v] …``;
    ``of_mass`` is the visit of each mass."""

    ptr: Tensor
    row: Tensor
    node: Tensor
    starts: Tensor
    skips: Tensor
    mass_ptr: Tensor
    of_mass: Tensor


@dataclass(frozen=True)
class ByteLayout:
    """Index arrays of one side of a batch: which sets of tokens each row's probabilities are summed over, and which
    event of which byte position each sum belongs to.

    Built from the arrays of a vocabulary's byte trie (``order low high own first_child children outside stops size``)
    and of a plan (``visit_ptr visit_node visit_starts visit_skips_target mass_ptr mass_row mass_position mass_event
    target position_row position_text supervised``), each documented where it is made.
    """

    trie: Mapping[str, NDArray[Any]]
    plan: Mapping[str, NDArray[Any]]
    size: int
    device: torch.device
    target: Tensor
    stops: Tensor
    mass_row: Tensor
    mass_cell: Tensor
    position_row: Tensor
    position_text: Tensor
    supervised: Tensor
    resolved: Tensor

    @property
    def rows(self) -> int:
        """Number of model states of the batch."""
        return int(self.target.shape[0])

    @property
    def positions(self) -> int:
        """Number of byte positions of the batch."""
        return int(self.supervised.shape[0])

    @classmethod
    def of(
        cls,
        trie: Mapping[str, NDArray[Any]],
        plan: Mapping[str, NDArray[Any]],
        size: int,
        device: torch.device,
    ) -> ByteLayout:
        """The layout of a plan on a device; ``size`` is the number of ids of the vocabulary."""

        def tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

        positions = plan["supervised"].size
        cell = plan["mass_position"].astype(np.int64) * EVENTS + plan["mass_event"]
        resolved = np.zeros(positions * EVENTS, np.bool_)
        resolved[cell] = True
        return cls(
            trie=trie,
            plan=plan,
            size=size,
            device=device,
            target=tensor(plan["target"], torch.int64),
            stops=tensor(trie["stops"], torch.int64),
            mass_row=tensor(plan["mass_row"], torch.int64),
            mass_cell=tensor(cell, torch.int64),
            position_row=tensor(plan["position_row"], torch.int64),
            position_text=tensor(plan["position_text"], torch.int64),
            supervised=tensor(plan["supervised"], torch.bool),
            resolved=tensor(resolved.reshape(positions, EVENTS), torch.bool),
        )

    def reaching(self, place: int, row: int) -> int:
        """How many rows before ``row``, which is the first that begins at ``place`` or later, are read for what comes
        there."""
        earlier = np.flatnonzero(self._reach[:row] >= place)
        return row - int(earlier[0]) if earlier.size else 0

    def window(self, places: slice, rows: slice) -> tuple[ByteLayout, slice]:
        """The layout of the byte positions ``places`` alone, numbered from 0 on, and the rows that it reads: ``rows``,
        which begin there, and earlier ones whose tokens can reach so far."""
        plan, rows = self.plan, slice(rows.start - self.reaching(places.start, rows.start), rows.stop)
        first, last = plan["visit_ptr"][[rows.start, rows.stop]].tolist()
        ptr, position = plan["visit_ptr"][rows.start : rows.stop + 1] - first, self._position[first:last]
        mass, until = plan["mass_ptr"][[first, last]].tolist()
        masses = np.diff(plan["mass_ptr"][first : last + 1])
        inside = (position >= places.start) & (position < places.stop)
        visits, columns = (
            slice(first, last),
            {"row": self.mass_row[mass:until], "cell": self.mass_cell[mass:until]},
        )
        if not inside.all():
            ptr = np.concatenate(([0], np.cumsum(inside)))[ptr]
            kept = torch.from_numpy(np.flatnonzero(np.repeat(inside, masses))).to(self.device)
            columns = {name: column[kept] for name, column in columns.items()}
            visits, masses = first + np.flatnonzero(inside), masses[inside]
        cut = replace(
            self,
            plan={
                "visit_ptr": ptr,
                "mass_ptr": np.concatenate(([0], np.cumsum(masses))),
                "target": plan["target"][rows],
                **{name: plan[name][visits] for name in _OF_VISITS},
            },
            target=self.target[rows],
            mass_row=columns["row"] - rows.start,
            mass_cell=columns["cell"] - places.start * EVENTS,
            # A position behind which nothing begins, and which carries no meaning, may name a row before the first.
            position_row=(self.position_row[places] - rows.start).clamp(min=0),
            position_text=self.position_text[places],
            supervised=self.supervised[places],
            resolved=self.resolved[places],
        )
        return cut, rows

    @cached_property
    def _position(self) -> NDArray[np.int64]:
        """The byte position of each visit."""
        found: NDArray[np.int64] = self.plan["mass_position"][self.plan["mass_ptr"][:-1]]
        return found

    @cached_property
    def _reach(self) -> NDArray[np.int64]:
        """The last byte position that each row visits; −1 for a row that visits none."""
        ptr = self.plan["visit_ptr"]
        reach = np.full(self.rows, -1)
        some = np.diff(ptr) > 0
        reach[some] = self._position[ptr[1:][some] - 1]
        return reach

    def mass_range(self, first_row: int, rows: int) -> tuple[int, int]:
        """First and one past the last mass of a block of rows."""
        visit_ptr, mass_ptr = self.plan["visit_ptr"], self.plan["mass_ptr"]
        first, last = visit_ptr[first_row], visit_ptr[first_row + rows]
        return int(mass_ptr[first]), int(mass_ptr[last])

    @cached_property
    def visits(self) -> Visits:
        """The plan's visits on the device: they travel there once a batch."""

        def tensor(name: str, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(self.plan[name]).to(self.device, dtype)

        ptr, mass_ptr = tensor("visit_ptr", torch.int64), tensor("mass_ptr", torch.int64)
        number = torch.arange(mass_ptr.numel() - 1, dtype=torch.int32, device=self.device)
        row = torch.arange(self.rows, dtype=torch.int32, device=self.device)
        return Visits(
            ptr=ptr,
            row=torch.repeat_interleave(row, ptr.diff(), output_size=number.numel()),
            node=tensor("visit_node", torch.int32),
            starts=tensor("visit_starts", torch.uint8),
            skips=tensor("visit_skips_target", torch.uint8),
            mass_ptr=mass_ptr,
            of_mass=torch.repeat_interleave(number, mass_ptr.diff(), output_size=self.mass_row.numel()),
        )

    def trie_on_device(self, width: int) -> DeviceTrie:
        """The trie on the device, for rows of ``width`` columns: it travels there once."""
        trie = self.trie
        key = (id(trie["order"]), width, self.device)
        if key not in _DEVICE_TRIES:
            outside = np.concatenate((self.outside(width), np.arange(self.size, width)))
            pool = np.concatenate((trie["order"], outside, trie["stops"])).astype(np.int32)
            position = np.empty_like(pool)
            position[pool] = np.arange(width, dtype=np.int32)
            arrays = {name: trie[name] for name in ("low", "high", "own", "first_child", "children")}
            arrays |= {"pool": pool, "position": position}
            tensors = {name: torch.from_numpy(a).to(self.device) for name, a in arrays.items()}
            _DEVICE_TRIES[key] = DeviceTrie(
                **tensors, texts=trie["order"].size, stop_low=width - trie["stops"].size
            )
            weakref.finalize(trie["order"], _DEVICE_TRIES.pop, key, None)
        return _DEVICE_TRIES[key]

    def in_order(self, width: int) -> tuple[Tensor, ByteLayout]:
        """The columns of rows ``width`` wide as they stand in the pool of the trie, and the layout of rows whose
        columns stand so: every set of tokens that begin alike is a range of them."""
        shared = self.trie_on_device(width)
        key = (id(self.trie["order"]), width)
        if key not in _TRIES_IN_ORDER:
            ids, (texts, stop_low) = np.arange(width, dtype=np.int32), (shared.texts, shared.stop_low)
            parts = {"order": ids[:texts], "outside": ids[texts:stop_low], "stops": ids[stop_low:]}
            _TRIES_IN_ORDER[key] = {**self.trie, **parts, "position": shared.position.cpu().numpy()}
            weakref.finalize(self.trie["order"], _TRIES_IN_ORDER.pop, key, None)
        trie, target = _TRIES_IN_ORDER[key], self.plan["target"]
        known = (target >= 0) & (target < width)
        target = np.where(known, trie["position"][np.where(known, target, 0)], -1).astype(np.int32)
        layout = replace(
            self,
            trie=trie,
            plan={**self.plan, "target": target},
            target=torch.from_numpy(target).to(self.device, torch.int64),
            stops=torch.from_numpy(trie["stops"]).to(self.device, torch.int64),
            size=width,
        )
        same = "visits", "_position", "_reach"
        vars(layout).update({name: vars(self)[name] for name in same if name in vars(self)})
        return shared.pool.long(), layout

    def outside(self, width: int) -> NDArray[Any]:
        """Ids that are neither text nor stop, of those that the output matrix has a row for."""
        ids = self.trie["outside"]
        return ids[: np.searchsorted(ids, width)]

    def pieces(self, first_row: int, rows: int, width: int) -> Pieces:
        """The runs of a block of rows over a pool of ids: text tokens in byte order, then all that is neither text nor
        stop (the output matrix's ``width`` beyond the vocabulary's size included), then the stop ids."""
        trie, plan = self.trie, self.plan
        texts = trie["order"].size
        outside = np.concatenate((self.outside(width), np.arange(self.size, width)))
        pool = np.concatenate((trie["order"], outside, trie["stops"]))
        first, last = int(plan["visit_ptr"][first_row]), int(plan["visit_ptr"][first_row + rows])
        node = plan["visit_node"][first:last].astype(np.int64)
        starts = plan["visit_starts"][first:last].astype(np.bool_)
        skips = plan["visit_skips_target"][first:last].astype(np.bool_)
        row = np.repeat(np.arange(rows), np.diff(plan["visit_ptr"][first_row : first_row + rows + 1]))
        base = (plan["mass_ptr"][first:last] - plan["mass_ptr"][first]).astype(np.int64)
        masses = int(plan["mass_ptr"][last] - plan["mass_ptr"][first])

        children = trie["children"][node].astype(np.int64)
        parent = np.repeat(np.arange(node.size), children)
        nth = np.arange(parent.size) - np.repeat(np.cumsum(children) - children, children)
        child = trie["first_child"][node[parent]] + nth
        begun = np.flatnonzero(starts)
        outside_low = np.full(begun.size, texts)
        stop_low = outside_low + outside.size
        columns = {
            "low": (trie["low"][node], trie["low"][child], outside_low, stop_low),
            "high": (
                trie["low"][node] + trie["own"][node],
                trie["high"][child],
                stop_low,
                stop_low + trie["stops"].size,
            ),
            "mass": (base, base[parent] + 1 + nth, base[begun], base[begun] + 1 + children[begun]),
            "row": (row, row[parent], row[begun], row[begun]),
            "skips_target": (skips, np.zeros(parent.size), skips[begun], np.zeros(begun.size)),
        }

        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array.astype(np.int64)).to(self.device)

        joined = {name: tensor(np.concatenate(arrays)) for name, arrays in columns.items()}
        return Pieces(
            pool=tensor(pool),
            low=joined["low"],
            high=joined["high"],
            mass=joined["mass"],
            row=joined["row"],
            skips_target=joined["skips_target"].bool(),
            masses=masses,
        )
