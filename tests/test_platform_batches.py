"""From tables to batches: conditions, the rows a stage may use, and reading ahead."""

import pickle
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import Row, repeatable, write_table
from hypothesis import given
from hypothesis import strategies as st

from pixart_platform.batches import Condition, RowIndex, map_ahead
from pixart_platform.errors import ManifestError, RecipeError
from pixart_platform.manifest import MANIFEST_FILE
from pixart_platform.order import Bucket, Order
from pixart_platform.storage import Folder
from pixart_platform.tables import ROW_GROUP_ROWS, Table

NUMBERS = pa.table({"a": pa.array([1, 2, None, 4]), "b": pa.array([0.5, None, 2.5, -1.0])})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [True, True, True, True]),
        ("a >= 2", [False, True, False, True]),
        ("a > 2", [False, False, False, True]),
        ("a <= 2", [True, True, False, False]),
        ("a<2", [True, False, False, False]),
        ("a == 4", [False, False, False, True]),
        ("a != 4", [True, True, False, False]),
        ("b < 0", [False, False, False, True]),
        ("b >= -1.0", [True, False, True, True]),
        ("a >= 1 and b > 0", [True, False, False, False]),
        ("a >= 1  and  a >= 2 and b >= -5", [False, False, False, True]),
    ],
)
def test_a_condition_selects_rows_and_null_satisfies_none(text: str, expected: list[bool]) -> None:
    assert Condition.parse(text).select(NUMBERS).tolist() == expected


@repeatable
@given(
    st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
    st.integers(-9, 9),
    st.lists(st.integers(-9, 9), max_size=20),
)
def test_a_condition_means_what_python_means(op: str, number: int, values: list[int]) -> None:
    selected = Condition.parse(f"x {op} {number}").select(
        pa.table({"x": pa.array(values, pa.int32())})
    )
    assert selected.tolist() == [eval(f"{value} {op} {number}") for value in values]


def test_a_condition_names_its_columns_once() -> None:
    assert Condition.parse("b > 1 and a < 2 and b < 3").columns == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    ["quality", "quality >=", ">= 0.6", "quality => 1", "quality >= high", "a >= 1 or b >= 2",
     "quality >= 0.6; import os", "a = 1", "a >= 1, b >= 2"],
)  # fmt: skip
def test_a_bad_condition_shows_itself_and_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not 'column op number', e.g. 'quality >= 0.6'"):
        Condition.parse(text)


# Two partitions; the first spans three row groups. Rejected rows and shapes are spread over them.
SIZES = (2 * ROW_GROUP_ROWS + 40, 30)
SHAPES: tuple[Bucket, ...] = ((4, 4), (2, 8))


class Case:
    """Aligned images, text and latents, and what each row should be, counted by hand."""

    def __init__(self, root: Path) -> None:
        rng = np.random.default_rng(0)
        images: list[list[Row]] = []
        text: list[list[Row]] = []
        latents: list[list[Row]] = []
        self.eligible: dict[Bucket, list[int]] = {shape: [] for shape in SHAPES}
        number = 0
        for size in SIZES:
            images.append([])
            text.append([])
            latents.append([])
            for _ in range(size):
                bad_image, bad_text = (bool(b) for b in rng.random(2) < 0.2)
                quality = None if rng.random() < 0.1 else float(rng.integers(0, 10)) / 8
                shape = SHAPES[int(rng.integers(2))]
                status = "rejected: broken" if bad_image else "ok"
                images[-1].append({"status": status, "quality": quality, "label": number})
                text_status = status if bad_image else "rejected: empty" if bad_text else "ok"
                features = {"features": f"t{number}".encode() * 9, "num_tokens": [number]}
                text[-1].append({"status": text_status} | features)
                height, width = (0, 0) if bad_image else shape
                latents[-1].append(
                    {"status": status, "moments": f"m{number}".encode(), "bucket_h": height,
                     "bucket_w": width}
                )  # fmt: skip
                if text_status == "ok" and quality is not None and quality >= 0.5:
                    self.eligible[shape].append(number)
                number += 1
        self.images = write_table(root / "images", "images/2", images)
        self.text = write_table(root / "text", "text/2", text)
        self.latents = write_table(root / "latents", "latents/1", latents)

    def columns_of(self, numbers: list[int]) -> dict[str, list[Any]]:
        return {
            "images.label": numbers,
            "latents.moments": [f"m{n}".encode() for n in numbers],
            "text.features": [f"t{n}".encode() * 9 for n in numbers],
            "text.num_tokens": [[n] for n in numbers],
        }

    @property
    def tables(self) -> dict[str, tuple[Table, list[str]]]:
        return {
            "images": (self.images, ["label"]),
            "latents": (self.latents, ["moments"]),
            "text": (self.text, ["features", "num_tokens"]),
        }


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def index(case: Case) -> RowIndex:
    return RowIndex(case.tables, Condition.parse("quality >= 0.5"))


def test_only_rows_ok_in_every_table_that_meet_the_condition_are_counted(
    case: Case, index: RowIndex
) -> None:
    assert {b: sum(counts) for b, counts in index.counts.items()} == {
        bucket: len(rows) for bucket, rows in case.eligible.items()
    }
    assert min(map(len, case.eligible.values())) > 50, "the case must not be trivial"


def test_counts_are_by_row_group(case: Case, index: RowIndex) -> None:
    edges = [0, ROW_GROUP_ROWS, 2 * ROW_GROUP_ROWS, SIZES[0], sum(SIZES)]
    for bucket, rows in case.eligible.items():
        assert index.counts[bucket].tolist() == np.histogram(rows, edges)[0].tolist()


def test_blocks_without_eligible_rows_are_left_out(case: Case) -> None:
    label = case.eligible[SHAPES[0]][-1]
    only = RowIndex(case.tables, Condition.parse(f"quality >= 0.5 and label == {label}"))
    assert {bucket: counts.tolist() for bucket, counts in only.counts.items()} == {SHAPES[0]: [1]}
    assert only.fetch(SHAPES[0], np.array([0]))["images.label"] == [label]


@repeatable
@given(st.data())
def test_any_samples_are_fetched_in_order_from_every_table(
    case: Case, index: RowIndex, data: st.DataObject
) -> None:
    bucket = data.draw(st.sampled_from(SHAPES))
    rows = case.eligible[bucket]
    samples = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=40))
    assert index.fetch(bucket, np.array(samples)) == case.columns_of([rows[s] for s in samples])


def test_an_epoch_of_an_order_fetches_every_eligible_row_once(case: Case, index: RowIndex) -> None:
    for bucket, rows in case.eligible.items():
        order = Order.over({bucket: index.counts[bucket]}, batch_images=len(rows), seed=1)
        found = index.fetch(*order.batch(0))["images.label"]
        assert sorted(found) == rows


def test_without_a_condition_only_the_status_counts(case: Case) -> None:
    tables: dict[str, tuple[Table, list[str]]] = {
        "images": (case.images, []), "latents": (case.latents, []),
    }  # fmt: skip
    whole = RowIndex(tables, Condition(()))
    assert sum(sum(c) for c in whole.counts.values()) == case.images.manifest.counts["ok"]
    assert whole.fetch(SHAPES[0], np.array([0, 1])) == {}


def test_a_condition_that_rejects_every_row_leaves_nothing(case: Case) -> None:
    empty = RowIndex(case.tables, Condition.parse("quality > 100"))
    assert not any(map(sum, empty.counts.values()))


@pytest.mark.parametrize("column", ["beauty", "status", "raw_caption"])
def test_a_condition_on_no_column_of_numbers_names_it_and_those_there_are(
    case: Case, column: str
) -> None:
    with pytest.raises(RecipeError, match=rf"where: .*'{column}'.*label, quality"):
        RowIndex(case.tables, Condition.parse(f"{column} >= 1"))


def test_tables_that_do_not_line_up_are_refused(case: Case, tmp_path: Path) -> None:
    short = write_table(tmp_path, "text/2", [[{"features": b""}]])
    with pytest.raises(ManifestError, match="does not line up"):
        RowIndex(case.tables | {"text": (short, ["features"])}, Condition(()))


def test_a_selection_narrows_what_is_eligible(case: Case, tmp_path: Path) -> None:
    """A whole partition of them is refused: its status counts know no ok."""
    status = [[{"status": "ok"}] * SIZES[0], [{"status": "rejected: copy"}] * SIZES[1]]
    chosen = write_table(tmp_path, "selection/1", status)
    index = RowIndex(case.tables | {"selection": (chosen, [])}, Condition.parse("quality >= 0.5"))
    for bucket, rows in case.eligible.items():
        found = index.fetch(bucket, np.arange(index.counts[bucket].sum()))
        assert found["images.label"] == [row for row in rows if row < SIZES[0]]


def test_tables_on_s3_give_the_same(case: Case, index: RowIndex, bucket: Folder) -> None:
    far = {
        name: (copy_table(table, bucket / name), columns)
        for name, (table, columns) in case.tables.items()
    }
    there = RowIndex(far, Condition.parse("quality >= 0.5"))
    for shape, counts in index.counts.items():
        samples = np.random.default_rng(0).permutation(counts.sum())[:50]
        assert there.fetch(shape, samples) == index.fetch(shape, samples)


def copy_table(table: Table, place: Folder) -> Table:
    for name in (MANIFEST_FILE, *(file.name for file in table.manifest.files)):
        place.write(name, table.folder.read(name))
    return Table.open(place)


def test_a_small_cache_reads_again_what_it_forgot(case: Case, index: RowIndex) -> None:
    small = RowIndex(case.tables, Condition.parse("quality >= 0.5"), cache_bytes=0)
    rows = case.eligible[SHAPES[0]]
    for samples in (np.arange(len(rows)), np.arange(len(rows))[::-1]):
        assert small.fetch(SHAPES[0], samples) == index.fetch(SHAPES[0], samples)


def test_an_index_that_travels_does_not_ask_for_the_partitions_again(
    index: RowIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pickle.dumps(index)
    with monkeypatch.context() as patch:
        patch.setattr(Table, "read", None)
        copy = pickle.loads(data)
    assert copy.counts.keys() == index.counts.keys()
    for shape, counts in index.counts.items():
        assert copy.counts[shape].tolist() == counts.tolist()
        samples = np.arange(counts.sum())
        assert copy.fetch(shape, samples) == index.fetch(shape, samples)


def test_a_partition_that_is_gone_is_named(tmp_path: Path) -> None:
    rows = [[{"moments": b"m", "bucket_h": 4, "bucket_w": 4}]]
    latents = write_table(tmp_path / "latents", "latents/1", rows)
    images = write_table(tmp_path / "images", "images/2", [[{}]])
    index = RowIndex({"images": (images, []), "latents": (latents, ["moments"])}, Condition(()))
    name = latents.manifest.files[0].name
    (tmp_path / "latents" / name).unlink()
    with pytest.raises(ManifestError, match=rf"{name}.* cannot be read .*restore it"):
        index.fetch((4, 4), np.array([0]))


def threads_ahead() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("ahead")}


@pytest.fixture
def others() -> set[threading.Thread]:
    """Threads that earlier tests' abandoned iterators may still have."""
    return threads_ahead()


def wait_until_ended(others: set[threading.Thread]) -> None:
    for thread in threads_ahead() - others:
        thread.join(20)
        assert not thread.is_alive()


def test_items_come_in_order_and_all_of_them(others: set[threading.Thread]) -> None:
    def make(n: int) -> int:
        time.sleep(0.003 if n % 3 == 0 else 0)
        return n * n

    assert list(map_ahead(make, range(5, 25), 4)) == [n * n for n in range(5, 25)]
    assert list(map_ahead(make, range(5, 5), 4)) == []
    wait_until_ended(others)


def test_the_next_items_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []

    def make(n: int) -> int:
        made.append(n)
        return n

    items = iter(map_ahead(make, range(10), 3))
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sorted(made) == [0, 1, 2], "three are under way, and no more"
    assert list(items) == list(range(1, 10))


def test_an_error_comes_at_its_item_and_ends_the_threads(others: set[threading.Thread]) -> None:
    def make(n: int) -> int:
        if n == 6:
            raise ManifestError("part-00006.parquet: cannot be read")
        return n

    seen: list[int] = []
    with pytest.raises(ManifestError, match="part-00006"):
        seen.extend(map_ahead(make, range(3, 20), 4))
    items = iter(map_ahead(make, range(3, 20), 4))
    assert list(islice(items, 3)) == [3, 4, 5]
    with pytest.raises(ManifestError, match="part-00006"):
        next(items)
    wait_until_ended(others)


def test_items_are_made_side_by_side() -> None:
    together = threading.Barrier(3)

    def make(n: int) -> int:
        together.wait(20)
        return n

    assert list(map_ahead(make, range(9), 3)) == list(range(9))


def test_abandoning_it_waits_for_nothing_and_makes_no_more(others: set[threading.Thread]) -> None:
    made: list[int] = []
    left = threading.Event()

    def make(n: int) -> int:
        made.append(n)
        if n >= 3:
            assert left.wait(20)
        return n

    items = iter(map_ahead(make, range(10_000), 4))
    assert list(islice(items, 3)) == [0, 1, 2]
    del items
    assert threads_ahead() - others, "a join in a finalizer hangs where a thread is starting"
    left.set()
    wait_until_ended(others)
    assert sorted(made) == list(range(len(made)))
    assert len(made) <= 7
