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

    event_V: Tensor
    events: int

    @cached_property
    def small(self) -> Tensor:
        """``event_V`` in 32 bits."""
        return self.event_V.int()

    @cached_property
    def order(self) -> Tensor:
        """The columns event by event, ascending within each."""
        return torch.argsort(self.event_V, stable=True)

    @cached_property
    def starts(self) -> Tensor:
        """Where in ``order`` each event begins, and the number of columns last."""
        counts = torch.bincount(self.event_V, minlength=self.events)
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
    target row_text position_row position_text supervised``), each documented where it is made.
    """

    trie: Mapping[str, NDArray[Any]]
    plan: Mapping[str, NDArray[Any]]
    size: int
    device: torch.device
    target: Tensor
    stops: Tensor
    mass_row: Tensor
    mass_cell: Tensor
    row_text: Tensor
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
            row_text=tensor(plan["row_text"], torch.int64),
            position_row=tensor(plan["position_row"], torch.int64),
            position_text=tensor(plan["position_text"], torch.int64),
            supervised=tensor(plan["supervised"], torch.bool),
            resolved=tensor(resolved.reshape(positions, EVENTS), torch.bool),
        )

    def texts(self, first: int, last: int) -> ByteLayout:
        """The layout of the texts ``first … last − 1`` alone: their rows, byte positions and masses, from 0 on."""
        edges = np.array([first, last])
        rows = np.searchsorted(self.plan["row_text"], edges)
        places = np.searchsorted(self.plan["position_text"], edges)
        visits = self.plan["visit_ptr"][rows]
        masses = self.plan["mass_ptr"][visits]
        (row, end), (place, stop), (mass, until) = rows.tolist(), places.tolist(), masses.tolist()
        plan = {
            "visit_ptr": self.plan["visit_ptr"][row : end + 1] - visits[0],
            "mass_ptr": self.plan["mass_ptr"][visits[0] : visits[1] + 1] - mass,
            "target": self.plan["target"][row:end],
            **{name: self.plan[name][visits[0] : visits[1]] for name in _OF_VISITS},
        }
        return replace(
            self,
            plan=plan,
            target=self.target[row:end],
            mass_row=self.mass_row[mass:until] - row,
            mass_cell=self.mass_cell[mass:until] - place * EVENTS,
            row_text=self.row_text[row:end] - first,
            position_row=self.position_row[place:stop] - row,
            position_text=self.position_text[place:stop] - first,
            supervised=self.supervised[place:stop],
            resolved=self.resolved[place:stop],
        )

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
        vars(layout)["visits"] = self.visits  # the same, and on the device already
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
