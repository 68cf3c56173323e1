"""``pixart table``: what a user sees of tables, on tables as small as that takes."""

import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pytest
from builders import Row, write_table
from PIL import Image
from typer.testing import CliRunner

from pixart_cluster.cli import cli
from pixart_platform.errors import ManifestError
from pixart_platform.storage import Folder, open_folder
from pixart_platform.tables import SCHEMAS, Table, TableWriter

ATTACK = "<script>alert('x')</script>"


def make_png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_run(root: Folder) -> dict[str, Table]:
    """The tables of a run over three pictures, of which one is broken."""
    pictures: list[Row] = [
        {"id": hashlib.sha256(data).hexdigest(), "bytes": data, "source": f"{color}.png", "uri": "",
         "width": 20, "height": 12, "raw_caption": f"a {color} {ATTACK}"}
        for color, data in ((c, make_png(c)) for c in ("red", "blue"))
    ]  # fmt: skip
    broken = {"id": "f" * 64, "status": "rejected: empty file", "bytes": b"", "source": "x.png"}
    images = write_table(root / "images-1", "images/2", [[*pictures, broken]])

    def derive(name: str, schema: str, ok: Row, empty: Row) -> Table:
        writer = TableWriter.under(root, name, schema, {}, {"images": images})
        rows = [{"id": row["id"], "status": "ok", **ok} for row in pictures]
        rows.append({"id": broken["id"], "status": broken["status"], **empty})
        writer.write(0, pa.Table.from_pylist(rows, SCHEMAS[schema]))
        return writer.commit()

    dense = "a photograph of two dogs and a cat on a table"
    captions = derive("captions", "captions/2", {"captions": [dense]}, {"captions": []})
    shape = {"bucket_h": 3, "bucket_w": 5, "width": 20, "height": 12, "moments": b"x"}
    latents = derive("latents", "latents/1", shape, dict.fromkeys(shape, 0) | {"moments": b""})
    return {"images": images, "captions": captions, "latents": latents}


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Table]:
    return write_run(open_folder(tmp_path))


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["table", *arguments])
    if result.exception:
        raise result.exception
    return result.output


def test_show_tells_rows_reasons_and_origin(run: dict[str, Table]) -> None:
    output = invoke("show", run["captions"].folder.uri)
    lines = {" ".join(line.split()) for line in output.splitlines()}
    assert {"rows 3", "ok 2", "rejected: empty file 1", "schema captions/2"} <= lines
    assert f"made from images {run['images'].digest}" in lines


@pytest.mark.parametrize("kind", ["images", "captions", "latents"])
def test_verify_finds_any_flipped_byte(run: dict[str, Table], kind: str) -> None:
    table = run[kind]
    assert "3 rows in 1 partitions are sound" in invoke("verify", table.folder.uri)
    (record,) = table.manifest.files
    data = bytearray(table.folder.read(record.name))
    data[len(data) // 3] ^= 16
    table.folder.write(record.name, bytes(data))
    with pytest.raises(ManifestError, match=rf"{record.name}: its bytes are not the ones"):
        invoke("verify", table.folder.uri)


def test_verify_refuses_an_id_that_is_there_twice(tmp_path: Path) -> None:
    rows: list[Row] = [{"id": "ab" * 32, "captions": ["x"]}] * 2
    table = write_table(open_folder(tmp_path / "t-1"), "captions/2", [rows])
    with pytest.raises(ManifestError, match="two rows that are ok have an id that begins abab"):
        invoke("verify", table.folder.uri)


@pytest.mark.parametrize("kind", ["images", "captions", "latents"])
def test_a_contact_sheet_shows_pictures_captions_and_buckets(
    run: dict[str, Table], kind: str, tmp_path: Path
) -> None:
    page_path = tmp_path / "sheet.html"
    invoke("sample", run[kind].folder.uri, "--out", str(page_path))
    page = page_path.read_text()
    assert page.count("<img ") == 2, "the broken picture is left out"
    assert "a photograph of two dogs" in page
    assert "3 x 5" in page
    assert ATTACK not in page
    assert "a red &lt;script&gt;" in page


def test_a_sheet_of_what_has_no_images_beside_it_says_so(tmp_path: Path) -> None:
    table = write_table(open_folder(tmp_path / "t-1"), "captions/2", [[{"captions": ["x"]}]])
    with pytest.raises(ManifestError, match="images it was made from or into is not beside it"):
        invoke("sample", table.folder.uri)


def test_concepts_compares_raw_and_dense_captions(run: dict[str, Table]) -> None:
    lines = [line.split() for line in invoke("concepts", run["captions"].folder.uri).splitlines()]
    assert lines[0][:2] == ["captions", "nouns"]
    raw, dense = lines[1], lines[2]
    assert (raw[0], dense[0]) == ("raw", "dense")
    assert float(dense[-1]) == 4, "photograph, dog, cat, table"
    assert float(dense[-1]) > float(raw[-1])


def test_tables_on_s3_are_looked_into_alike(bucket: Folder) -> None:
    tables = write_run(bucket / "run")
    assert "2" in invoke("show", tables["images"].folder.uri)
    assert "are sound" in invoke("verify", *(table.folder.uri for table in tables.values()))
