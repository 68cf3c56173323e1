"""Selection: a verdict per row that only rows before it can change, and counts that add up."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import Row, make_rows, repeatable, write_table
from hypothesis import given
from hypothesis import strategies as st

from pixart_jobs import selection
from pixart_jobs.recipe import Recipe, SelectSettings
from pixart_jobs.selection import (
    find_duplicates,
    find_first_near,
    find_near_duplicates,
    make_filters,
    plan,
    run,
    select_rows,
)
from pixart_platform.errors import RecipeError
from pixart_platform.storage import open_folder
from pixart_platform.tables import Table, count_statuses

FAR = 2**64 - 1
RECIPE: dict[str, Any] = {
    "name": "pile",
    "stages": {
        "one": {
            "condition_on": "class", "start_from": "scratch", "resolution": 32, "images": 64,
            "optimizer": {"learning_rate": 1e-4},
        }
    },
}  # fmt: skip


def make_recipe(**select: Any) -> Recipe:
    return Recipe.model_validate(RECIPE | {"select": select})


def picture(number: int, **more: Any) -> Row:
    """A row of the image table; its id and hash follow from ``number``."""
    return {
        "id": f"{number:064x}"[::-1],
        "source": f"{number}.png",
        "width": 64,
        "raw_caption": "a red fox",
        "phash": number,
        **more,
    }


def select(rows: list[Row], partition_rows: int = 3, **settings: Any) -> list[str]:
    """The statuses of all rows."""
    parts = [rows[i : i + partition_rows] for i in range(0, len(rows), partition_rows)]
    tables = [make_rows("images/2", part) for part in parts]
    found = list(
        select_rows(
            lambda k, names: tables[k].select(names), len(parts), SelectSettings(**settings)
        )
    )
    assert [t["id"].to_pylist() for t in found] == [t["id"].to_pylist() for t in tables]
    return [status for table in found for status in table["status"].to_pylist()]


def test_of_exact_duplicates_the_first_is_kept_and_named() -> None:
    fox, hen = picture(1), picture(2)
    assert select([fox, hen, fox | {"source": "b.png"}, hen, fox]) == [
        "ok", "ok", "rejected: duplicate (of 1.png)", "rejected: duplicate (of 2.png)",
        "rejected: duplicate (of 1.png)",
    ]  # fmt: skip


def test_near_duplicates_are_judged_against_kept_rows_only() -> None:
    hashes = [0b0, 0b11, 0b1111, 0b111111, FAR, FAR - 0b1]
    rows = [picture(i, phash=h) for i, h in enumerate(hashes)]
    assert select(rows) == ["ok"] * 6, "off unless asked for"
    assert select(rows, near_duplicate_bits=2) == [
        "ok", "rejected: near duplicate (of 0.png)", "ok", "rejected: near duplicate (of 2.png)",
        "ok", "rejected: near duplicate (of 4.png)",
    ]  # fmt: skip
    assert select(rows, near_duplicate_bits=0) == ["ok"] * 6


def test_a_picture_is_not_lost_because_its_first_copy_was_refused() -> None:
    mute, told = picture(1, raw_caption=""), picture(1, source="b.png")
    near = picture(2, phash=1)
    assert select([mute, told, near], min_caption_words=1, near_duplicate_bits=1) == [
        "rejected: too few caption words (select.min_caption_words = 1)",
        "ok",
        "rejected: near duplicate (of b.png)",
    ]


def test_rows_rejected_before_keep_their_status_and_stand_for_nothing() -> None:
    broken = picture(1, status="rejected: broken picture (cut)", phash=0)
    same = picture(1, phash=0)
    assert select([broken, same, broken], near_duplicate_bits=4) == [
        "rejected: broken picture (cut)", "ok", "rejected: broken picture (cut)",
    ]  # fmt: skip


def test_the_first_filter_that_refuses_is_the_reason() -> None:
    rows = [
        picture(1, width=64),
        picture(2, width=32, raw_caption=""),
        picture(3, raw_caption="fox"),
        picture(4, raw_caption="one fox of many"),
        picture(5, raw_caption="a BAD fox"),
        picture(6, width=None),
    ]
    statuses = select(
        rows, where="width >= 64", min_caption_words=2, max_caption_words=3, blocked_words=["bad"]
    )
    assert statuses == [
        "ok",
        "rejected: fails select.where (width >= 64)",
        "rejected: too few caption words (select.min_caption_words = 2)",
        "rejected: too many caption words (select.max_caption_words = 3)",
        "rejected: blocked word (select.blocked_words)",
        "rejected: fails select.where (width >= 64)",
    ]


@pytest.mark.parametrize(
    ("caption", "blocked"),
    [
        ("bad", True), ("a Bad, bad dog", True), ("not-BAD!", True), ("badly", False),
        ("forbad", False), ("bad_dog", False), ("ein \u00dcbel", True), ("\u00fcbelst", False),
        ("d\u00fcbel", False), ("a hot doggy", False), ("a hot dog", True), ("50% (off)", True),
        ("50", False), ("", False),
    ],
)  # fmt: skip
def test_blocked_words_are_whole_words_in_any_case(caption: str, blocked: bool) -> None:
    words = ("bad", "\u00fcbel", " hot  dog ", "50% (off)")
    (one,) = make_filters(SelectSettings(blocked_words=words))
    rows = make_rows("images/2", [picture(1, raw_caption=caption)])
    assert one.keeps(rows).tolist() == [not blocked]


def settle_slowly(hashes: list[int], num_bits: int) -> list[int]:
    """What ``find_near_duplicates`` says in words: the earliest kept row that is near."""
    earliest = list(range(len(hashes)))
    for late, one in enumerate(hashes):
        near = (
            early
            for early in range(late)
            if earliest[early] == early and (hashes[early] ^ one).bit_count() <= num_bits
        )
        earliest[late] = next(near, late)
    return earliest


# Around a few centres, so that rows are near one another now and then.
crowds = st.lists(
    st.builds(
        lambda centre, flips: centre ^ sum(1 << bit for bit in flips),
        st.sampled_from([0, 2**64 - 1, 0x9E3779B97F4A7C15]),
        st.sets(st.integers(0, 63), max_size=6),
    ),
    max_size=40,
)


@repeatable
@given(crowds, st.integers(0, 7), st.integers(1, 8))
def test_near_duplicates_are_those_of_a_search_of_all_pairs(
    hashes: list[int], num_bits: int, leaf_rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_LEAF_ROWS", leaf_rows)
        patch.setattr(selection, "_PAIRS_AT_ONCE", leaf_rows)
        found = find_near_duplicates(np.array(hashes, np.uint64), num_bits)
    assert found.tolist() == settle_slowly(hashes, num_bits)


@pytest.mark.parametrize("num_bits", range(8))
def test_many_rows_are_compared_without_missing_a_pair(num_bits: int) -> None:
    rng = np.random.default_rng(num_bits)
    left = rng.integers(0, 2**64, 3000, np.uint64)
    right = rng.integers(0, 2**64, 1000, np.uint64)
    right[::2] = left[rng.integers(0, 3000, 500)]
    for step in [1] * num_bits + [4]:  # a quarter differs in a bit too many
        right[::step] ^= np.uint64(1) << rng.integers(0, 64, 1000 // step).astype(np.uint64)
    near = np.bitwise_count(right[:, None] ^ left) <= num_bits
    expected = np.where(near.any(1), near.argmax(1), len(left))
    found = find_first_near(left, right, num_bits)
    np.testing.assert_array_equal(found, expected)
    assert 200 < (found < len(left)).sum() < 500


def test_a_crowd_of_look_alikes_is_not_compared_with_itself() -> None:
    """20,000 blank pages are 200 million pairs, but one kept row."""
    found = find_near_duplicates(np.full(20_000, FAR, np.uint64), 4)
    assert not found.any()


@repeatable
@given(st.lists(st.integers(0, 9), max_size=30))
def test_first_rows_of_equal_keys(keys: list[int]) -> None:
    found = find_duplicates(np.array(keys, np.uint64) << np.uint64(60))
    assert found.tolist() == [keys.index(key) for key in keys]


pictures = st.builds(
    picture,
    st.integers(0, 12),
    status=st.sampled_from(["ok", "ok", "rejected: not a picture"]),
    source=st.sampled_from(["a.png", "b (2).png"]),
    width=st.sampled_from([32, 64]),
    raw_caption=st.sampled_from(["", "fox", "a red fox", "a bad fox"]),
)


@repeatable
@given(st.lists(pictures, min_size=1, max_size=15), st.data())
def test_verdicts_stay_when_a_source_grows_and_counts_add_up(rows: list[Row], data: Any) -> None:
    settings: dict[str, Any] = {
        "near_duplicate_bits": data.draw(st.none() | st.integers(0, 2)),
        "where": data.draw(st.sampled_from(["", "width >= 64"])),
        "min_caption_words": data.draw(st.integers(0, 2)),
        "blocked_words": data.draw(st.sampled_from([(), ("bad",)])),
    }
    statuses = select(rows, **settings)
    first = data.draw(st.integers(1, len(rows)))
    assert select(rows[:first], data.draw(st.integers(1, 7)), **settings) == statuses[:first]
    counts = count_statuses(pa.table({"status": statuses}))
    assert sum(counts.values()) == len(rows)
    kept = [row["id"] for row, status in zip(rows, statuses, strict=True) if status == "ok"]
    assert len(set(kept)) == len(kept), "ids of kept rows are unique"
    before = [row["status"] for row in rows]
    assert all(b in ("ok", s) for b, s in zip(before, statuses, strict=True))


def make_images(folder: Path, num_partitions: int) -> Table:
    rows = [picture(i % 7, source=f"{i}.png") for i in range(3 * num_partitions)]
    return write_table(folder, "images/2", [rows[i : i + 3] for i in range(0, len(rows), 3)])


def test_the_table_lines_up_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 4)
    writer = plan(make_recipe(), open_folder(tmp_path), images)
    (partition,) = [rows for k, rows in enumerate(select_rows(images.read, 4, SelectSettings()))
                    if k == 1]  # fmt: skip
    writer.write(1, partition)
    written = list(run(make_recipe(), images, writer))
    assert [k for k, _ in written] == [0, 2, 3], "what was written is not written again"
    assert written[0] == (0, {"ok": 3})
    table = writer.commit()
    assert table.manifest.counts == {"ok": 7, "rejected: duplicate": 5}
    for k in range(4):
        assert table.read(k, ["id"]).equals(images.read(k, ["id"]))


def test_partitions_of_a_source_that_grew_are_taken_over(tmp_path: Path) -> None:
    for partitions, adopted in ((2, 0), (4, 2)):
        images = make_images(tmp_path / f"images-{partitions}", partitions)
        writer = plan(make_recipe(), open_folder(tmp_path / "tables"), images)
        assert writer.adopt() == adopted
        assert len(list(run(make_recipe(), images, writer))) == 2
        writer.commit()


def test_a_partition_is_not_taken_over_when_an_earlier_one_changed(tmp_path: Path) -> None:
    last = [picture(1)]
    for first, status in ((picture(1), "rejected: duplicate (of 1.png)"), (picture(2), "ok")):
        images = write_table(tmp_path / f"images-{status[:2]}", "images/2", [[first], last])
        writer = plan(make_recipe(), open_folder(tmp_path / "tables"), images)
        assert writer.adopt() == 0
        list(run(make_recipe(), images, writer))
        assert writer.commit().read(1, ["status"])["status"].to_pylist() == [status]


def test_a_condition_on_no_column_of_numbers_is_refused_by_name(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 1)
    with pytest.raises(RecipeError, match=r"select\.where: .* no column 'raw_caption' of numbers"):
        plan(make_recipe(where="raw_caption >= 3"), open_folder(tmp_path), images)
