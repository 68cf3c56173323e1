"""Fidelity's protocol: which rows, which pictures, which features; the same ones every time."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from evaluations import make_recipe, write_clip, write_reference

from pixart_jobs import fidelity
from pixart_jobs.encode import fit
from pixart_jobs.fidelity import (
    FidelityError,
    FidelitySuite,
    choose_rows,
    find_tables,
    read_references,
)
from pixart_jobs.scenes import compose_scene
from pixart_jobs.suites import _Judging, encode_png
from pixart_models.buckets import Size
from pixart_models.digits import describe
from pixart_models.extractors import PCA, PcaExtractor
from pixart_models.text import ModelNotFound
from pixart_platform.storage import open_folder
from pixart_platform.tables import SCHEMAS, Table, TableWriter

Tables = dict[str, Table]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """20 rows in partitions of 7, 4 of them without caption."""
    return write_reference(tmp_path_factory.mktemp("tables"))


def test_rows_are_a_seeded_choice_of_those_that_are_ok(tables: Tables) -> None:
    places, prompts = choose_rows(tables["captions"], 10, seed=1)
    numbers = [7 * k + i for k, i in places]
    assert len(set(numbers)) == 10
    assert numbers == sorted(numbers)
    assert not any(n % 5 == 4 for n in numbers)
    assert prompts == [describe(compose_scene(n, seed=5).reading) for n in numbers]
    assert choose_rows(tables["captions"], 10, seed=1) == (places, prompts)
    assert choose_rows(tables["captions"], 10, seed=2)[0] != places
    assert set(places) < set(choose_rows(tables["captions"], 12, seed=1)[0])
    assert len(choose_rows(tables["captions"], 16, seed=1)[0]) == 16


def test_more_rows_than_there_are_is_refused(tables: Tables) -> None:
    with pytest.raises(FidelityError, match=r"num_references = 17: .* has 16 rows that are ok"):
        choose_rows(tables["captions"], 17, seed=1)


def test_references_are_fitted_as_encoding_does(tables: Tables) -> None:
    places = [(0, 2), (0, 6), (1, 0), (2, 5)]
    found = [*read_references(tables["images"].folder.uri, places, 40)]
    wanted = [fit(compose_scene(7 * k + i, seed=5).image, Size(40, 40)) for k, i in places]
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def open_suite(tables: Tables, root: Path, *overrides: str, side: int = 32) -> FidelitySuite:
    return FidelitySuite.open(make_recipe(*overrides), side, tables, root)


def test_what_decides_the_figures_is_in_the_settings(tables: Tables, tmp_path: Path) -> None:
    first = open_suite(tables, tmp_path).settings
    assert open_suite(tables, tmp_path / "elsewhere", "evaluate.num_workers=3").settings == first
    clip = write_clip(tmp_path / "clip")
    others = [
        open_suite(tables, tmp_path, "evaluate.seed=4"), open_suite(tables, tmp_path, side=40),
        open_suite(tables, tmp_path, "evaluate.num_references=11"),
        open_suite(tables, tmp_path, f"evaluate.extractor={clip}"),
        open_suite(tables, tmp_path, f"evaluate.clip={clip}"),
    ]  # fmt: skip
    assert all(other.settings != first for other in others)
    names = {
        suite._writer(open_folder(tmp_path)).folder.name
        for suite in (*others[:4], open_suite(tables, tmp_path))
    }
    assert len(names) == 5, "references of each in a table of their own"


def judge(suite: FidelitySuite, pictures: Sequence[np.ndarray]) -> pa.Table:
    rows = {
        "id": [f"{i:016x}" for i in range(len(pictures))], "prompt": ["a one"] * len(pictures),
        "png": [encode_png(picture) for picture in pictures],
    }  # fmt: skip
    return _Judging(suite)(pa.table(rows))


def fill(suite: FidelitySuite, root: Path, pictures: Sequence[np.ndarray]) -> TableWriter:
    """What ``prepare`` leaves, of these pictures."""
    assert suite.fitted
    suite.fitted.write_bytes(PcaExtractor.fit(pictures).dump())
    writer = suite._writer(open_folder(root))
    size = suite.batch_images
    for k in range(writer.num_partitions):
        writer.write(k, judge(suite, pictures[k * size : (k + 1) * size]))
    writer.commit()
    return writer


def test_pictures_that_are_the_references_are_at_no_distance(
    tables: Tables, tmp_path: Path
) -> None:
    suite = open_suite(tables, tmp_path, f"evaluate.clip={write_clip(tmp_path / 'clip')}")
    pictures = [*read_references(suite.images, suite.places, 32)]
    fill(suite, tmp_path, pictures)
    rows = judge(suite, pictures).to_pylist()
    found = suite.measure(rows, open_folder(tmp_path))
    values = {name: figure.value for name, figure in found.figures.items()}
    assert values["fid"] == pytest.approx(0, abs=1e-5)
    assert (values["precision"], values["recall"]) == (1, 1)
    assert found.figures["recall"].low < 1
    assert set(found.outcomes) == {"precision", "clip_score"}
    assert all(len(pairs) == 12 for pairs in found.outcomes.values())
    assert values["clip_score"] == pytest.approx(
        np.mean([p[0] for p in found.outcomes["clip_score"]])
    )
    assert any("covariances are singular" not in note for note in found.notes)
    assert any(f"own CLIP score is {values['clip_score']:.2f}" in note for note in found.notes)

    noise = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8) for i in range(12)]
    far = suite.measure(judge(suite, noise).to_pylist(), open_folder(tmp_path)).figures
    assert far["fid"].value > 1
    assert far["precision"].value == 0


def test_an_extractor_that_is_another_here_is_refused(tables: Tables, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip")
    suite = open_suite(tables, tmp_path, f"evaluate.extractor={clip}")
    (tmp_path / "clip" / "merges.txt").write_text("#version: 0.3\n")
    with pytest.raises(ModelNotFound, match="this machine has another revision"):
        suite.make_judge()


def test_features_that_are_not_finite_name_the_extractor(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = open_suite(tables, tmp_path)
    pictures = [*read_references(suite.images, suite.places, 32)]
    fitted = PcaExtractor.fit(pictures)
    fitted.axes[0, 0] = np.nan
    monkeypatch.setattr(fidelity, "load_extractor", lambda *_: fitted)
    with pytest.raises(FidelityError, match=re.escape(f"{PCA!r}: its features are not all finite")):
        judge(suite, pictures)


def test_tables_that_are_not_made_yet_are_named(tmp_path: Path) -> None:
    recipe = make_recipe()
    with pytest.raises(FidelityError, match=r"images-\w+: the recipe's images table is not there"):
        find_tables(recipe, open_folder(tmp_path))


def test_a_reference_is_found_by_its_caption_table(tables: Tables, tmp_path: Path) -> None:
    named = make_recipe(f"evaluate.reference={tables['captions'].folder.uri}")
    found = find_tables(named, open_folder(tmp_path))
    assert {k: t.digest for k, t in found.items()} == {k: t.digest for k, t in tables.items()}


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    rows = [{"id": "0" * 64, "status": "ok", "source": "cat.jpg", "uri": "", "bytes": b"x" * 9}]
    writer = TableWriter(open_folder(tmp_path / "images"), "images/2", {}, {}, ("k",))
    writer.write(0, pa.Table.from_pylist(rows, SCHEMAS["images/2"]))
    writer.commit()
    with pytest.raises(FidelityError, match=r"images: cat.jpg: not a picture"):
        [*read_references(str(tmp_path / "images"), [(0, 0)], 32)]
