"""Work that reports how far it is: who hears it, and where it is left."""

from __future__ import annotations

import threading

import pytest

from gold.activity import Activity, Stopped, doing, listening, report, stop_asked, stoppable


class Ear:
    def __init__(self) -> None:
        self.heard: list[Activity] = []
        self.stops = False

    def hear(self, activity: Activity) -> None:
        self.heard.append(activity)


def test_blocks_and_reports_are_heard_by_the_innermost_listener() -> None:
    outer, inner = Ear(), Ear()
    with listening(outer), doing("a"):
        report(1, 2, "texts")
        with listening(inner), doing("b"):
            report(3, 4, "tokens", tokens=5)
        report(2, 2, "texts")
    report(9, 9, "nobody listens")
    assert outer.heard == [Activity(("a",)), Activity(("a",), 1, 2, "texts"), Activity(("a",), 2, 2, "texts")]
    assert inner.heard == [Activity(("a", "b")), Activity(("a", "b"), 3, 4, "tokens", 5)]


def test_work_is_left_only_where_it_can_be() -> None:
    ear = Ear()
    with listening(ear):
        ear.stops = True
        report(0, 1, "outside of any block")
        with doing("a"):
            report(0, 1, "outside")
            with pytest.raises(Stopped), stoppable():
                report(0, 1, "inside")
            report(1, 1, "outside again")
        assert stop_asked()
    assert [each.unit for each in ear.heard] == ["", "outside", "outside again"]
    assert not stop_asked()


def test_threads_are_not_heard_and_not_stopped() -> None:
    ear, reached = Ear(), []

    def work() -> None:
        report(0, 1, "in a thread")
        reached.append(stop_asked())

    ear.stops = True
    with listening(ear), stoppable():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert (reached, ear.heard) == ([False], [])
