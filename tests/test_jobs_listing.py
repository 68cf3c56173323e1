"""Listings: who is where stays so while a source grows, shrinks and changes."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st

from pixart_jobs.listing import (
    GONE,
    Item,
    Listing,
    assign,
    keep_listing,
    split_name,
    to_items,
    to_table,
)
from pixart_platform.storage import Folder, LocalFolder

NOTHING = assign(to_table([]).append_column("partition", pa.array([], pa.int32())), to_table([]), 1)
contents = st.dictionaries(st.text("abc/", max_size=4), st.integers(0, 2), max_size=12)


def found(content: Mapping[str, int]) -> pa.Table:
    return to_table(Item(name, name, num_bytes=tag, tag=str(tag)) for name, tag in content.items())


def grow(history: list[dict[str, int]], rows: int) -> list[pa.Table]:
    """The listing after each state of a source."""
    tables = [NOTHING]
    for content in history:
        tables.append(assign(tables[-1], found(content), rows))
    return tables


def names(table: pa.Table) -> list[str]:
    return [item.name for item in to_items(table)]


@repeatable
@given(st.lists(contents, min_size=1, max_size=5), st.integers(1, 4))
def test_known_items_keep_their_places_whatever_happens(
    history: list[dict[str, int]], rows: int
) -> None:
    tables = grow(history, rows)
    for before, after in pairwise(tables):
        kept = after[: len(before)]
        assert kept["name"] == before["name"]
        assert kept["partition"] == before["partition"]
        new = after[len(before) :]["partition"].to_pylist()
        assert not set(new) & set(before["partition"].to_pylist())


@repeatable
@given(st.lists(contents, min_size=1, max_size=5), st.integers(1, 4))
def test_nothing_is_lost_or_doubled_and_what_is_gone_says_so(
    history: list[dict[str, int]], rows: int
) -> None:
    last = grow(history, rows)[-1]
    items = to_items(last)
    assert len({item.name for item in items}) == len(items)
    assert {item.name for item in items} == {name for content in history for name in content}
    assert {i.name: i.num_bytes for i in items if i.problem != GONE} == history[-1]


@repeatable
@given(st.lists(contents, min_size=1, max_size=4), st.integers(1, 4))
def test_listing_again_changes_nothing_and_order_does_not_matter(
    history: list[dict[str, int]], rows: int
) -> None:
    last = grow(history, rows)[-1]
    assert assign(last, found(history[-1]), rows).equals(last)
    backwards = [dict(reversed(content.items())) for content in history]
    assert grow(backwards, rows)[-1].equals(last)


@repeatable
@given(contents, contents, st.integers(1, 4))
def test_partitions_are_full_but_the_last_of_each_generation(
    first: dict[str, int], second: dict[str, int], rows: int
) -> None:
    tables = grow([first, second], rows)
    for before, after in pairwise(tables):
        numbers = after["partition"].to_pylist()
        assert numbers == sorted(numbers)
        assert set(numbers) == set(range(len(set(numbers))))
        new = numbers[len(before) :]
        assert all(new.count(k) == rows for k in new[:-1] if k != new[-1])


def test_new_items_of_a_file_are_in_the_order_of_their_offsets() -> None:
    rows = to_table(Item(f"t:{k}", "t", offset=k) for k in (10, 2, 9))
    assert names(assign(NOTHING, rows, 2)) == ["t:2", "t:9", "t:10"]


def test_items_survive_the_table_whatever_bytes_their_names_are_of() -> None:
    items = [
        Item("caf\udce9\\xe9.png", "caf\u00e9", 3, 4, "t", "c.txt", 5, 6, "u", label=7),
        Item("", "", problem="x"),
    ]
    assert to_items(to_table(items)) == items


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.tar.GZ", ("a/b.tar", "a/b", ".gz")),
        ("a.b/c", ("a.b/c", "a.b/c", "")),
        ("a.b/.c", ("a.b/", "a.b/", ".c")),
        ("a/", ("a/", "a/", "")),
        ("", ("", "", "")),
    ],
)
def test_a_name_has_a_stem_a_key_and_a_suffix(name: str, parts: tuple[str, str, str]) -> None:
    assert split_name(name) == parts


def keep(
    folder: Folder, content: Mapping[str, int], *, rows: int = 2, source: str = "s"
) -> Listing:
    return keep_listing(folder, source, rows, lambda _: found(content))


@pytest.fixture
def folder(root: Folder) -> Folder:
    return root / "kept"


def test_an_unchanged_source_writes_nothing(folder: Folder) -> None:
    content = {"a": 1, "b": 1, "c": 1}
    listing = keep(folder, content)
    assert [e.name for e in folder.walk()] == ["listing-00000.arrow"]
    before = list(folder.walk())
    assert keep(folder, dict(reversed(content.items()))) == listing
    assert list(folder.walk()) == before
    assert [[i.name for i in listing.items(k)] for k in range(2)] == [["a", "b"], ["c"]]


def test_a_source_that_grew_is_the_next_generation_and_old_readers_keep_theirs(
    folder: Folder,
) -> None:
    old = keep(folder, {"b": 1, "c": 1, "d": 1})
    new = keep(folder, {"a": 1, "b": 1, "c": 1, "d": 1})
    assert [e.name for e in folder.walk()] == ["listing-00000.arrow", "listing-00001.arrow"]
    assert [[i.name for i in new.items(k)] for k in range(3)] == [["b", "c"], ["d"], ["a"]]
    assert (old.num_partitions, new.num_partitions) == (2, 3)
    assert new.parts()[:2] == old.parts()
    assert keep(folder, {"a": 1, "b": 1, "c": 1, "d": 1}) == new


def test_only_the_partition_of_a_changed_item_changes(tmp_path: Path) -> None:
    kept = LocalFolder(tmp_path)
    content = dict.fromkeys("abcdef", 1)
    first = keep(kept, content).parts()
    assert len(set(first)) == 3
    edited = keep(kept, content | {"c": 2}).parts()
    assert [a == b for a, b in zip(first, edited, strict=True)] == [True, False, True]
    gone = keep(kept, {n: t for n, t in content.items() if n != "f"}).parts()
    assert [a == b for a, b in zip(first, gone, strict=True)] == [True, True, False]
    assert keep(kept, content).parts() == first


@pytest.mark.parametrize(
    "change",
    [
        {"num_bytes": 1}, {"tag": "x"}, {"caption": "b"}, {"caption_bytes": 1},
        {"caption_tag": "x"}, {"label": 1}, {"problem": "x"},
    ],
)  # fmt: skip
def test_a_part_is_named_by_all_that_can_change_its_rows(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    item = Item("a", "a")
    changed = item._replace(**change)
    one = keep_listing(LocalFolder(tmp_path), "s", 1, lambda _: to_table([item])).parts()
    assert keep_listing(LocalFolder(tmp_path), "s", 1, lambda _: to_table([changed])).parts() != one


def test_equal_files_of_two_sources_are_two_parts(tmp_path: Path) -> None:
    one, other = (keep(LocalFolder(tmp_path / s), {"a": 1}, source=s) for s in ("s", "z"))
    assert one.parts() != other.parts()


def test_two_writers_of_a_generation_agree(folder: Folder) -> None:
    """The loser looks again at what the winner saved, so that nobody's places move."""
    later = {"a": 1, "b": 1}

    def race(first: str) -> Listing:
        views = iter([{first: 1}])
        return keep_listing(folder, "s", 4, lambda _: found(next(views, later)))

    with ThreadPoolExecutor(2) as pool:
        listings = list(pool.map(race, "ab"))
    final = keep(folder, later, rows=4)
    assert sorted(i.name for k in range(final.num_partitions) for i in final.items(k)) == ["a", "b"]
    for listing in listings:
        for k in range(listing.num_partitions):
            assert [i.name for i in listing.items(k)] == [i.name for i in final.items(k)]
