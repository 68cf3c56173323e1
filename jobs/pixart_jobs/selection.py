"""Selection: which images go on. Image table -> a verdict per row, aligned with it.

A row's verdict depends on itself and the rows before it alone, so a source that grew leaves old
verdicts as they were. Filters come first; of the rows that pass them, one is a duplicate when an
earlier one has the same bytes, and a near duplicate when a kept earlier one's perceptual hash
differs in few bits. So a picture is never lost because its first copy had a bad caption.

One process reads a few columns twice and holds no strings between but the names of duplicates:
about 100 bytes a row at the worst moment, 2.5 GB of 25 million. A million rows take 5 s, with near
duplicates of 4 bits 14 s and of 7 bits 50 s; 8 million with 4 bits, 2.5 minutes.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, combinations
from math import comb
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pixart_jobs.recipe import Recipe, SelectSettings
from pixart_platform.batches import Condition, map_ahead
from pixart_platform.partitions import Progress
from pixart_platform.storage import Folder
from pixart_platform.tables import OK, Table, TableWriter, count_statuses

SCHEMA = "selection/1"
_THREADS = 16  # requests at a time
Rows = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Read = Callable[[int, list[str]], pa.Table]  # columns of a partition of the image table
_LEAF_ROWS = 512
_PAIRS_AT_ONCE = 1 << 21
_MIXER = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 / golden ratio


def plan(recipe: Recipe, root: Folder, images: Table) -> TableWriter:
    """The writer of this recipe's selection. Raises RecipeError for a column that is not there."""
    Condition.parse(recipe.select.where).check(images, "select.where")
    settings = recipe.select.model_dump(mode="json")
    # A partition's verdicts are made from it and all before it.
    parts = accumulate(
        (file.sha256 for file in images.manifest.files),
        lambda before, own: hashlib.sha256((before + own).encode()).hexdigest(),
    )
    return TableWriter.under(root, "selection", SCHEMA, settings, {"images": images}, [*parts])


def run(recipe: Recipe, images: Table, writer: TableWriter) -> Progress:
    """Decide over all rows and write the unfinished partitions, in this process."""
    found = select_rows(images.read, images.num_partitions, recipe.select)
    written = writer.written()

    def write(item: tuple[int, pa.Table]) -> tuple[int, dict[str, int]]:
        writer.write(*item)
        return item[0], count_statuses(item[1])

    unwritten = ((k, rows) for k, rows in enumerate(found) if k not in written)
    return map_ahead(write, unwritten, _THREADS)


@dataclass(frozen=True)
class Filter:
    """Why a row is refused, what of it is looked at, and (rows,) True where it may stay."""

    reason: str
    columns: list[str]
    keeps: Callable[[pa.Table], NDArray[np.bool_]]


def make_filters(settings: SelectSettings) -> list[Filter]:
    """The filters that are on, in the order in which they are asked."""
    filters = []
    if settings.where:
        where = Condition.parse(settings.where)
        filters.append(
            Filter(f"fails select.where ({settings.where})", where.columns, where.select)
        )
    if least := settings.min_caption_words:
        reason = f"too few caption words (select.min_caption_words = {least})"
        filters.append(Filter(reason, ["raw_caption"], lambda rows: count_words(rows) >= least))
    if most := settings.max_caption_words:
        reason = f"too many caption words (select.max_caption_words = {most})"
        filters.append(Filter(reason, ["raw_caption"], lambda rows: count_words(rows) <= most))
    if settings.blocked_words:
        words = "|".join(re.escape(" ".join(word.split())) for word in settings.blocked_words)
        pattern = rf"(?i)(^|[^\pL\pM\pN_])({words})($|[^\pL\pM\pN_])"
        filters.append(
            Filter(
                "blocked word (select.blocked_words)",
                ["raw_caption"],
                lambda rows: ~_to_numpy(pc.match_substring_regex(rows["raw_caption"], pattern)),
            )
        )
    return filters


def count_words(rows: pa.Table) -> Rows:
    """(rows,) of the raw captions; ingest left one space between words."""
    captions = rows["raw_caption"]
    spaces = _to_numpy(pc.count_substring(captions, " "))
    words: Rows = spaces + _to_numpy(pc.not_equal(captions, ""))
    return words


def _to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    return np.asarray(column.to_numpy())


def select_rows(read: Read, num_partitions: int, settings: SelectSettings) -> Iterator[pa.Table]:
    """Rows of a selection table, partition by partition; ``read`` gives columns of the image table.

    Rows that were rejected before keep their status.
    """
    filters = make_filters(settings)
    reasons = ["", *(one.reason for one in filters), "duplicate", "near duplicate"]
    duplicate, near = len(reasons) - 2, len(reasons) - 1
    keys, hashes, verdict, begins = _gather(read, num_partitions, filters)

    earlier = np.arange(len(verdict))
    usable = np.flatnonzero(verdict == 0)
    earlier[usable] = usable[find_duplicates(keys[usable])]
    verdict[earlier < np.arange(len(earlier))] = duplicate
    if settings.near_duplicate_bits is not None:
        usable = usable[verdict[usable] == 0]
        earlier[usable] = usable[find_near_duplicates(hashes[usable], settings.near_duplicate_bits)]
        verdict[usable[earlier[usable] < usable]] = near
    del keys, hashes, usable

    named = np.unique(earlier[earlier < np.arange(len(earlier))])
    names: dict[int, str] = {}
    for k, rows in enumerate(_read_all(read, num_partitions, ["id", "status", "source"])):
        first, last = begins[k : k + 2]
        mine = named[slice(*np.searchsorted(named, (first, last)))]
        names |= zip(mine.tolist(), rows["source"].take(mine - first).to_pylist(), strict=True)
        status = rows["status"].to_pylist()
        for i in (first + np.flatnonzero(verdict[first:last] > 0)).tolist():
            detail = f" (of {names[earlier[i]]})" if earlier[i] < i else ""
            status[i - first] = f"rejected: {reasons[verdict[i]]}{detail}"
        yield pa.table({"id": rows["id"], "status": pa.array(status, pa.string())})


def _read_all(read: Read, num_partitions: int, columns: list[str]) -> Iterator[pa.Table]:
    def read_one(k: int) -> pa.Table:
        return read(k, columns)

    return map_ahead(read_one, range(num_partitions), _THREADS)


def _gather(
    read: Read, num_partitions: int, filters: list[Filter]
) -> tuple[Hashes, Hashes, NDArray[np.int8], Rows]:
    """(N,) ids' first 8 bytes, perceptual hashes, verdicts; (partitions + 1,) where each begins.

    A verdict is the number of the first filter that refuses, from 1; 0 if none does, -1 of a row
    that was rejected before.
    """
    columns = {"id", "status", "phash"}.union(*(one.columns for one in filters))
    keys, hashes, verdicts = [], [], []
    for rows in _read_all(read, num_partitions, sorted(columns)):
        keys.append(np.array([int(i[:16], 16) for i in rows["id"].to_pylist()], np.uint64))
        hashes.append(_to_numpy(rows["phash"]).astype(np.uint64))
        verdict = np.zeros(rows.num_rows, np.int8)
        for number, one in reversed(list(enumerate(filters, start=1))):
            verdict[~one.keeps(rows)] = number
        verdict[_to_numpy(pc.not_equal(rows["status"], OK))] = -1
        verdicts.append(verdict)
    begins = np.cumsum([0, *map(len, keys)])
    return np.concatenate(keys), np.concatenate(hashes), np.concatenate(verdicts), begins


def find_duplicates(keys: Hashes) -> Rows:
    """(N,) number of the first row with the same key: its own where there is none before."""
    order = np.argsort(keys, kind="stable")
    begins = np.append(True, np.diff(keys[order]) != 0)[: len(keys)]  # runs of equal keys
    first = np.empty(len(keys), np.int64)
    first[order] = order[begins][np.cumsum(begins) - 1]
    return first


def find_near_duplicates(hashes: Hashes, num_bits: int) -> Rows:
    """(N,) number of the earliest kept row at most ``num_bits`` away; a row is kept if its own.

    Halves: settle the first, compare the second with what was kept of it, settle the rest of the
    second. So no crowd of look-alikes is ever compared with itself, only with the few that stand
    for it.
    """
    earliest: Rows = np.arange(len(hashes))

    def find_kept(first: int, last: int) -> Rows:
        kept: Rows = np.flatnonzero(earliest[first:last] == np.arange(first, last))
        return kept + first

    def settle(first: int, last: int) -> None:
        if last - first <= _LEAF_ROWS:
            rows = find_kept(first, last)
            distance = np.bitwise_count(hashes[rows][:, None] ^ hashes[rows])
            for late, early in np.argwhere(np.tril(distance <= num_bits, -1)).tolist():
                if earliest[rows[late]] == rows[late] and earliest[rows[early]] == rows[early]:
                    earliest[rows[late]] = rows[early]
            return
        middle = (first + last) // 2
        settle(first, middle)
        left, right = find_kept(first, middle), find_kept(middle, last)
        nearest = find_first_near(hashes[left], hashes[right], num_bits)
        found = nearest < len(left)
        earliest[right[found]] = left[nearest[found]]
        settle(middle, last)

    settle(0, len(hashes))
    return earliest


def find_first_near(left: Hashes, right: Hashes, num_bits: int) -> Rows:
    """(len(right),) the first of ``left`` at most ``num_bits`` away, or len(left).

    Pigeonhole: of m bands of bits, at most ``num_bits`` can differ, so m - ``num_bits`` agree
    whole. Every choice of that many bands makes groups of equal bits to compare within.
    """
    total = len(left) + len(right)

    def cost(num_bands: int) -> float:  # in ns: of sorting once a choice, and of comparing pairs
        agreeing = 64 * (num_bands - num_bits) // num_bands
        pairs = len(left) * len(right) / 2.0**agreeing
        return comb(num_bands, num_bits) * (40 * total + 30 * pairs)

    num_bands = min(range(num_bits + 1, num_bits + 6), key=cost)
    index_bits = np.uint64(max(len(left), len(right)).bit_length())
    nearest = np.full(len(right), len(left))
    for bands in combinations(range(num_bands), num_bands - num_bits):
        mask = np.uint64(sum(1 << bit for bit in range(64) if bit % num_bands in bands))
        ours, theirs = _pack(left, mask, index_bits), _pack(right, mask, index_bits)
        for early, late in _pair_up(ours, theirs, index_bits):
            close = np.bitwise_count(left[early] ^ right[late]) <= num_bits
            np.minimum.at(nearest, late[close], early[close])
    return nearest


def _pack(hashes: Hashes, mask: np.uint64, index_bits: np.uint64) -> Hashes:
    """(N,) sorted: above ``index_bits`` a key of the bits under ``mask``, below them the row.

    Equal bits give equal keys; that other bits may too costs time alone.
    """
    packed = hashes & mask
    packed *= _MIXER
    packed >>= index_bits
    packed <<= index_bits
    packed |= np.arange(len(packed), dtype=np.uint64)
    packed.sort()
    return packed


def _pair_up(left: Hashes, right: Hashes, index_bits: np.uint64) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of a left and a right row of equal keys, a bounded number at a time."""
    row_mask = (np.uint64(1) << index_bits) - np.uint64(1)
    begin = np.searchsorted(left, right & ~row_mask)
    count = np.searchsorted(left, right | row_mask, "right") - begin  # (rights,) of its key
    some = count > 0
    begin, right, count = begin[some], right[some], count[some]
    done = np.append(0, np.cumsum(count))
    start = 0
    while start < len(right):
        stop = max(start + 1, int(np.searchsorted(done, done[start] + _PAIRS_AT_ONCE, "right")) - 1)
        which = np.repeat(np.arange(start, stop), count[start:stop])
        step = np.arange(done[start], done[stop]) - done[which]
        early, late = left[begin[which] + step] & row_mask, right[which] & row_mask
        yield early.astype(np.int64), late.astype(np.int64)
        start = stop
