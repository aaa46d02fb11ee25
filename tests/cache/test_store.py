"""What is kept of a teacher comes back as it went in, whatever happens to the folder meanwhile."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gold.cache.shard
from gold.cache.codes import STEP, Scores, _codes, _values, decode, encode
from gold.cache.shard import Origin
from gold.cache.store import ScoreCache, merge
from gold.errors import ConfigError, GoldError, TeacherError

BOUND = 7.1e-5

# Codes


@st.composite
def scores(draw: st.DrawFn) -> Scores:
    """Rows of any width, some of whose tokens, or all others, have no probability."""
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        ids = draw(st.lists(st.integers(0, 2**18), unique=True, min_size=1, max_size=6))
        logits = draw(
            st.lists(
                st.floats(-300, 0) | st.just(-np.inf) | st.floats(-1e-3, 0),
                min_size=len(ids) + 1,
                max_size=len(ids) + 1,
            ).filter(lambda x: max(x) > -np.inf)
        )
        logp = np.array(logits) - np.logaddexp.reduce(logits)
        rows.append((ids, np.minimum(logp, 0.0)))
    width = max([len(ids) for ids, _ in rows], default=1)
    ids_NK, logp_NK = np.full((len(rows), width), -1, np.int64), np.full((len(rows), width), -np.inf)
    for n, (ids, logp) in enumerate(rows):
        ids_NK[n, : len(ids)], logp_NK[n, : len(ids)] = ids, logp[:-1]
    return Scores(ids_NK, logp_NK, np.array([logp[-1] for _, logp in rows]))


@given(scores())
def test_what_comes_back_is_what_went_in_within_the_stated_bound(went: Scores) -> None:
    found = decode(encode(went))
    np.testing.assert_array_equal(found.ids_NK, went.ids_NK)
    events = np.concatenate((went.logp_NK, went.log_rest_N[:, None]), axis=1)
    back = np.concatenate((found.logp_NK, found.log_rest_N[:, None]), axis=1)
    np.testing.assert_array_equal(np.isneginf(back), np.isneginf(events))
    there = np.isfinite(events)
    entropy = -np.where(there, np.exp(events) * np.where(there, events, 0.0), 0.0).sum(1, keepdims=True)
    allowed = BOUND * (2.0 - events + entropy)
    assert (np.abs(back[there] - events[there]) <= allowed[there] + 1e-12).all()
    np.testing.assert_allclose(np.exp(back).sum(1), 1.0, rtol=0, atol=1e-12)


def test_every_code_is_the_code_of_its_value() -> None:
    codes = np.arange(65_536, dtype=np.uint16)
    values = _values(codes)
    np.testing.assert_array_equal(_codes(values), codes)
    assert values[0] == 0.0
    assert values[65_534] == pytest.approx(-10_000.0)
    assert (np.diff(values) < 0).all()
    # Half a step is what a value can be off.
    middle = -np.expm1((codes[:-2] + 0.5) * STEP)
    assert (np.abs(middle - values[:-2]) <= BOUND * (1.0 - middle)).all()


def test_likely_rows_keep_what_little_is_left() -> None:
    """The likeliest token's own code cannot tell 1 − 1e-6 from 1; the mass of the others can."""
    logp = np.log1p(-1e-6)
    back = decode(encode(Scores(np.array([[3]]), np.array([[logp]]), np.log([1e-6]))))
    assert float(back.logp_NK[0, 0]) == pytest.approx(logp, rel=2e-3)


def test_a_row_in_the_format_by_hand() -> None:
    data = encode(Scores(np.array([[5, 2]]), np.log([[0.5, 0.25]]), np.log([0.25])))
    half, quarter = (round(np.log1p(-np.log(p)) / STEP).to_bytes(2, "little") for p in (0.5, 0.25))
    # One row, two tokens of three bits; the rest; 101 010 and two bits to spare.
    assert data == bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 2, 0]) + quarter + half + quarter + bytes([0b10101000])


@pytest.mark.parametrize(
    ("logp", "rest", "line"),
    [
        (np.nan, -1.0, "row 1 add up to nan"),
        (-0.5, -np.inf, "row 1 add up to 0.6065"),
        (0.0, 0.0, "add up to 2"),
    ],
)
def test_what_is_no_distribution_is_refused(logp: float, rest: float, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        encode(Scores(np.array([[1], [1]]), np.array([[0.0], [logp]]), np.array([-np.inf, rest])))


@settings(max_examples=30)
@given(scores(), st.data())
def test_bytes_of_another_length_are_refused(went: Scores, data: st.DataObject) -> None:
    whole = encode(went)
    with pytest.raises(ValueError, match="its length is not what its first bytes say"):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])


# The folder

ORIGIN = Origin("teacher", "r1", "v1", 5)
Contents = dict[bytes, bytes]


def key(n: int) -> bytes:
    return ORIGIN.key([n], [], False)


def payload(n: int, size: int = 40) -> bytes:
    return np.random.default_rng(n).bytes(size)


def written(folder: Path, *sessions: Iterable[int], origin: Origin = ORIGIN, size: int = 40) -> Path:
    """A cache to which processes one after the other have added texts."""
    for numbers in sessions:
        with ScoreCache.open(folder, origin) as cache:
            for n in numbers:
                cache.add([(key(n), 3, payload(n, size))])
    return folder


def contents(folder: Path) -> Contents:
    """Every text of a cache that is whole."""
    cache = ScoreCache.open(folder, ORIGIN)
    found = {k: cache.get(k) for k in list(cache)}
    return {k: data for k, data in found.items() if data is not None}


def expected(numbers: Iterable[int]) -> Contents:
    return {key(n): payload(n) for n in numbers}


NUMBERS = st.lists(st.integers(0, 6), max_size=6)


@settings(max_examples=40)
@given(st.lists(st.lists(NUMBERS, max_size=3), max_size=4))
def test_what_was_added_is_there(
    tmp_path_factory: pytest.TempPathFactory, sessions: list[list[list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("cache") / "c"
    seen: set[int] = set()
    for session in sessions:
        with ScoreCache.open(folder, ORIGIN) as cache:
            for numbers in session:
                cache.add([(key(n), 3, payload(n)) for n in numbers])
                seen |= set(numbers)
                assert {k: cache.get(k) for k in cache} == expected(seen)
            assert cache.get(key(99)) is None
    if seen:
        cache = ScoreCache.open(folder)
        assert contents(folder) == expected(seen)
        assert (len(cache), cache.rows, cache.verify()) == (len(seen), 3 * len(seen), [])
    else:
        assert not folder.exists()


def test_a_full_shard_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gold.cache.shard, "SHARD_BYTES", 300)
    written(tmp_path, range(10))
    assert len(list(tmp_path.glob("*.scores"))) > 2
    assert contents(tmp_path) == expected(range(10))
    assert ScoreCache.open(tmp_path).verify() == []


def test_a_shard_cut_at_any_byte_is_found_and_loses_nothing_that_is_whole(tmp_path: Path) -> None:
    written(tmp_path / "c", range(3), range(3, 6))
    shard = tmp_path / "c" / "000001.scores"
    whole = shard.read_bytes()
    record = len(payload(0)) + 36
    start = len(whole) - 8 - 3 * record
    for size in range(len(whole)):
        shard.write_bytes(whole[:size])
        kept = max(0, (size - start) // record)
        assert contents(tmp_path / "c") == expected(range(3 + min(3, kept))), size
        (damage,) = ScoreCache.open(tmp_path / "c").verify()
        assert damage.end == size
        assert str(damage).startswith(f"{shard}: bytes ")
        if size % 20 == 0:  # it is built again, in a shard of its own
            shard.write_bytes(whole[:size])
            with ScoreCache.open(tmp_path / "c", ORIGIN) as cache:
                cache.add([(key(n), 3, payload(n)) for n in range(6) if key(n) not in cache])
            assert contents(tmp_path / "c") == expected(range(6))
            (tmp_path / "c" / "000002.scores").unlink(missing_ok=True)


def test_every_flipped_byte_is_found_and_costs_one_text_at_most(tmp_path: Path) -> None:
    written(tmp_path, range(3), range(3, 6))
    shard = tmp_path / "000000.scores"
    whole = shard.read_bytes()
    everything = expected(range(6))
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        shard.write_bytes(flipped)
        cache = ScoreCache.open(tmp_path, ORIGIN)
        assert any(d.start <= at < d.end for d in cache.verify()), at
        found = contents(tmp_path)
        assert found.items() <= everything.items()
        assert len(found) >= 5
    shard.write_bytes(whole)
    assert ScoreCache.open(tmp_path).verify() == []


@settings(max_examples=40)
@given(st.data())
def test_whatever_is_written_over_it_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = written(tmp_path_factory.mktemp("cache"), range(4), range(4, 8))
    shard = folder / f"00000{data.draw(st.integers(0, 1))}.scores"
    whole = shard.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.binary(min_size=1, max_size=60) | st.just(whole[36:100]))
    spoiled = whole[:at] + other + whole[at + data.draw(st.integers(0, 80)) :]
    shard.write_bytes(spoiled)
    found = contents(folder)
    assert found.items() <= expected(range(8)).items()
    assert len(found) >= 4
    if spoiled != whole:
        assert ScoreCache.open(folder, ORIGIN).verify()


def test_a_damaged_text_gives_way_to_the_same_that_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path / "c", [1, 2])
    shard = tmp_path / "c" / "000000.scores"
    spoiled = bytearray(shard.read_bytes())
    spoiled[-10] ^= 1
    shard.write_bytes(spoiled)
    with ScoreCache.open(tmp_path / "c") as cache:
        assert cache.get(key(2)) is None
        assert re.search(r"WARNING .*000000\.scores: bytes .* counts as not there", caplog.text)
        assert key(2) not in cache
        cache.add([(key(2), 3, payload(2))])
        assert cache.get(key(2)) == payload(2)
    assert contents(tmp_path / "c") == expected([1, 2])


# Several writers


def test_two_who_write_at_once_each_have_their_shard(tmp_path: Path) -> None:
    with ScoreCache.open(tmp_path, ORIGIN) as one, ScoreCache.open(tmp_path, ORIGIN) as other:
        for n in range(5):
            one.add([(key(n), 3, payload(n))])
            other.add([(key(n + 3), 3, payload(n + 3))])
        live = ScoreCache.open(tmp_path)
        assert all("still writing" in str(d) for d in live.verify())
    assert contents(tmp_path) == expected(range(8))
    cache = ScoreCache.open(tmp_path)
    assert (cache.verify(), cache.repeated, len(cache.shards)) == ([], 2, 2)


def test_of_two_who_begin_at_once_the_second_takes_the_next_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ScoreCache.open(written(tmp_path, [1]), ORIGIN)
    with monkeypatch.context() as patch, cache:
        patch.setattr(Path, "glob", lambda *_: iter(()))  # it has looked before the first one began
        cache.add([(key(2), 3, payload(2))])
    assert contents(tmp_path) == expected([1, 2])
    assert sorted(p.name for p in tmp_path.glob("*")) == ["000000.scores", "000001.scores"]


WRITER = """
import os, sys, numpy
from gold.cache.shard import Origin
from gold.cache.store import ScoreCache
folder, first, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
origin = Origin("teacher", "r1", "v1", 5)
cache = ScoreCache.open(folder, origin)
for n in range(first, first + int(sys.argv[4])):
    cache.add([(origin.key([n], [], False), 3, numpy.random.default_rng(n).bytes(size))])
    os.write(1, b"%d\\n" % n)
cache.close()
"""


def writer(folder: Path, first: int, size: int, count: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", WRITER, str(folder), str(first), str(size), str(count)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(gold.__file__).parents[2])


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    processes = [writer(tmp_path, 10 * n, 40, 20) for n in range(3)]
    assert all(p.communicate(timeout=900) and p.returncode == 0 for p in processes)
    assert contents(tmp_path) == expected(range(40))
    assert ScoreCache.open(tmp_path).verify() == []


def test_the_end_of_a_process_closes_what_it_wrote(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            WRITER.replace("cache.close()", "raise KeyboardInterrupt"),
            str(tmp_path),
            "0",
            "9",
            "3",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(gold.__file__).parents[2],
    )
    assert b"KeyboardInterrupt" in process.communicate(timeout=900)[1]
    cache = ScoreCache.open(tmp_path)
    assert (len(cache), cache.verify()) == (3, [])


def test_a_kill_at_any_moment_loses_nothing_that_was_added(tmp_path: Path) -> None:
    told: set[int] = set()
    size = 2**20
    for number in range(4):
        process = writer(tmp_path, 100 * number, size, 100)
        assert process.stdout is not None
        told.add(int(process.stdout.readline()))  # it has begun
        time.sleep(0.013 * number)
        process.send_signal(signal.SIGKILL)
        told |= {int(line) for line in process.communicate(timeout=900)[0].splitlines() if line}
    cache = ScoreCache.open(tmp_path)
    assert {key(n) for n in told} <= set(cache)
    assert len(cache) <= len(told) + 4
    for n in told:
        assert cache.get(key(n)) == payload(n, size)
    assert all("cut short" in str(d) for d in cache.verify())


# A disk that is full


@pytest.mark.parametrize("before", [0, 2])
def test_a_full_disk_leaves_the_cache_as_it_was(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(file: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", refuse)
        return real(file, data[: len(data) // 2])

    def refuse(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ScoreCache.open(tmp_path / "c", ORIGIN) as cache:
        for n in range(before):
            cache.add([(key(n), 3, payload(n))])
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(TeacherError, match=r"cannot be written: No space left on device"):
            cache.add([(key(8), 3, payload(8)), (key(9), 3, payload(9))])
        assert list(cache) == [key(n) for n in range(before)]
        monkeypatch.setattr(os, "write", real)
        cache.add([(key(9), 3, payload(9))])
    assert contents(tmp_path / "c") == expected([*range(before), 9])
    assert ScoreCache.open(tmp_path / "c").verify() == []


# Merging


@settings(max_examples=15)
@given(NUMBERS, NUMBERS, NUMBERS)
def test_the_order_of_merging_does_not_matter_and_twice_is_once(
    tmp_path_factory: pytest.TempPathFactory, a: list[int], b: list[int], c: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    parts = [written(folder / name, [n, 50 + i]) if (n := i) >= 0 else folder for i, name in enumerate("xyz")]
    for part, numbers in zip(parts, (a, b, c), strict=True):
        written(part, numbers)
    x, y, z = parts
    merge(folder / "xy", [x, y])
    merge(folder / "xy_z", [folder / "xy", z])
    merge(folder / "yz", [y, z])
    merge(folder / "x_yz", [x, folder / "yz"])
    merge(folder / "all", [x, y, z, x])
    whole = contents(folder / "all")
    assert whole == contents(folder / "xy_z") == contents(folder / "x_yz")
    assert whole == contents(x) | contents(y) | contents(z)
    cache, damage = merge(folder / "all", [folder / "xy_z", x])
    assert (contents(folder / "all"), damage, cache.repeated) == (whole, [], 0)
    assert len(list((folder / "all").glob("*.scores"))) == 1


def test_of_different_scores_of_one_text_the_first_counts(tmp_path: Path) -> None:
    for name, data in (("a", b"one"), ("b", b"other")):
        with ScoreCache.open(tmp_path / name, ORIGIN) as cache:
            cache.add([(key(0), 1, data)])
    merge(tmp_path / "ab", [tmp_path / "a", tmp_path / "b"])
    merge(tmp_path / "b", [tmp_path / "a"])
    assert contents(tmp_path / "ab") == {key(0): b"one"}
    assert contents(tmp_path / "b") == {key(0): b"other"}


def test_merging_leaves_out_what_is_damaged_and_says_so(tmp_path: Path) -> None:
    written(tmp_path / "c", range(4))
    shard = tmp_path / "c" / "000000.scores"
    spoiled = bytearray(shard.read_bytes())
    spoiled[-10] ^= 1
    shard.write_bytes(spoiled)
    with open(tmp_path / "c" / "000001.scores", "wb") as file:
        file.write(spoiled[:100])
    cache, damage = merge(tmp_path / "new", [tmp_path / "c"])
    assert contents(tmp_path / "new") == expected(range(3))
    assert cache.verify() == []
    assert sorted(d.shard.name for d in damage) == ["000000.scores", "000001.scores"]


# Whose scores they are


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (
            Origin("t2", "r2", "v1", 5),
            "revision r1, and this is t2",
        ),
        (
            Origin("t2", "r1", "v2", 5),
            "vocabulary v1, and this is t2",
        ),
        (
            Origin("t2", "r1", "v1", 9),
            "top_k 5, and this is t2",
        ),
    ],
)
def test_another_teachers_cache_is_refused(tmp_path: Path, other: Origin, line: str) -> None:
    written(tmp_path / "a", [1])
    with pytest.raises(ConfigError, match=line):
        ScoreCache.open(tmp_path / "a", other)
    written(tmp_path / "b", [1], origin=other)
    with pytest.raises(ConfigError, match="holds scores of"):
        merge(tmp_path / "c", [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "c").exists()
    (tmp_path / "b" / "000000.scores").rename(tmp_path / "a" / "000007.scores")
    with pytest.raises(TeacherError, match=r"teacher \(.* and t2 "):
        ScoreCache.open(tmp_path / "a")


def test_the_name_of_a_teacher_decides_nothing(tmp_path: Path) -> None:
    written(tmp_path, [1])
    assert len(ScoreCache.open(tmp_path, Origin("/elsewhere/teacher", "r1", "v1", 5))) == 1


def test_what_a_key_depends_on() -> None:
    texts: list[tuple[Any, ...]] = [
        ([1], [2], False),
        ([1], [2], True),
        ([1, 2], [], False),
        ([], [1, 2], False),
    ]
    origins = [ORIGIN, Origin("t", "r2", "v1", 5), Origin("t", "r1", "v1", 4)]
    assert len({origin.key(*text) for origin in origins for text in texts}) == 12


def test_what_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="gold cache build"):
        ScoreCache.open(tmp_path / "nowhere")
    with pytest.raises(TeacherError, match="nowhere"):
        merge(tmp_path / "into", [written(tmp_path / "a", [1]), tmp_path / "nowhere"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        ScoreCache.open(tmp_path / "file", ORIGIN)
    (tmp_path / "000000.scores").write_text("not at all")
    with pytest.raises(TeacherError, match="no shard says whose scores it holds"):
        ScoreCache.open(tmp_path)


def shard(origin: bytes, rest: bytes = b"") -> bytes:
    """A file that begins with this, whatever it is, and is whole."""
    store = gold.cache.shard
    return store._SHARD + store._ORIGIN.pack(len(origin), crc32(origin)) + origin + rest


GOOD_ORIGIN = json.dumps({"teacher": "t", "revision": "r1", "vocabulary": "v1", "top_k": 5})
ORIGINS = {
    "no JSON": "teacher",
    "a list": "[1]",
    "nothing": "null",
    "other keys": '{"teacher": "t"}',
    "one key more": GOOD_ORIGIN[:-1] + ', "x": 1}',
    "a number in quotes": GOOD_ORIGIN.replace("5", '"5"'),
    "a truth for a number": GOOD_ORIGIN.replace("5", "true"),
    "a number of 5,000 digits": GOOD_ORIGIN.replace("5", "5" * 5000),
    "below 0": GOOD_ORIGIN.replace("5", "-5"),
    "no text": GOOD_ORIGIN.replace('"r1"', "[]"),
    "deep": '{"teacher": ' + "[" * 60_000,
}


def _folder(where: Path, kind: str) -> None:
    """Makes what is no cache there."""
    path = where / "000000.scores"
    if kind == "a pipe for a folder":
        where.rmdir()
        os.mkfifo(where)
    elif kind == "a folder that links to itself":
        where.rmdir()
        where.symlink_to(where)
    elif kind == "a folder that links to nothing":
        where.rmdir()
        where.symlink_to(where.parent / "gone")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a link to nothing":
        path.symlink_to(where / "gone")
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "no bytes":
        path.touch()
    elif kind == "the beginning alone":
        path.write_bytes(shard(GOOD_ORIGIN.encode())[:20])
    else:
        path.write_bytes(shard(ORIGINS[kind].encode() if kind in ORIGINS else b"\xff\xfe"))


@pytest.mark.parametrize(
    "kind",
    [
        "a pipe for a folder", "a folder that links to itself", "a folder that links to nothing", "a pipe", "a folder",
        "a link to itself", "a link to nothing", "a device", "no bytes", "the beginning alone", "no UTF-8", *ORIGINS,
    ],
)  # fmt: skip
def test_whatever_lies_where_a_cache_should_is_one_line(kind: str, tmp_path: Path) -> None:
    there = tmp_path / "cache"
    there.mkdir()
    _folder(there, kind)
    with pytest.raises(GoldError) as error:
        ScoreCache.open(there)
    assert str(error.value).startswith((f"cache {there}: ", f"{there}/"))
    assert "\n" not in str(error.value)
    with pytest.raises(GoldError):
        merge(tmp_path / "into", [there])
    assert not (tmp_path / "into").exists()


def test_a_shard_that_is_cut_or_gone_under_way_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not by a signal: what lies beyond the end of a file cannot be mapped."""
    written(tmp_path, [1], [2], size=100_000)
    cache, other = ScoreCache.open(tmp_path), ScoreCache.open(tmp_path)
    os.truncate(tmp_path / "000000.scores", 1000)
    assert cache.get(key(1)) is None
    assert "counts as not there" in caplog.text
    (tmp_path / "000001.scores").unlink()
    with pytest.raises(TeacherError, match=r"000001.scores cannot be read"):
        other.get(key(2))
    with pytest.raises(TeacherError, match=r"000001.scores cannot be read"):
        assert other.size_bytes


def test_an_origin_that_cannot_be_read_leaves_the_records_of_others(tmp_path: Path) -> None:
    written(tmp_path, [1])
    (tmp_path / "000001.scores").write_bytes(shard(b"[1]"))
    assert contents(tmp_path) == expected([1])
    assert [d.shard.name for d in ScoreCache.open(tmp_path).damage] == ["000001.scores"]


def test_a_record_that_points_beyond_its_file_is_damage(tmp_path: Path) -> None:
    store = gold.cache.shard
    for length in (41, 2**31, 2**32 - 1):
        head = store._RECORD.pack(store._MARK, key(1), length, 3, 0)
        data = head + store._CRC.pack(crc32(head)) + payload(1)
        (tmp_path / "000000.scores").write_bytes(shard(GOOD_ORIGIN.encode(), data))
        cache = ScoreCache.open(tmp_path)
        assert (len(cache), len(cache.damage)) == (0, 1)
