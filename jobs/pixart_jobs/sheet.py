"""Contact sheets: a few rows of the tables as a person would look at them.

Picture, raw caption, dense captions and bucket side by side, in HTML that needs nothing else. Rows
come from a handful of row groups, so a sheet of a table of millions reads a few of its files.
"""

import base64
import html
import io

import numpy as np
import pyarrow as pa
from PIL import Image

from pixart_jobs.pictures import PictureError, read_picture
from pixart_platform.errors import ManifestError
from pixart_platform.storage import FileAbsent, Folder
from pixart_platform.tables import OK, ROW_GROUP_ROWS, Table, check_aligned

_BLOCKS = 4
_THUMBNAIL = 192  # pixels


def sheet_page(tables: dict[str, Table], num_rows: int, seed: int) -> str:
    """A whole page; see ``sheet_of``."""
    names = ", ".join(html.escape(table.folder.uri) for table in tables.values())
    return (
        "<!doctype html><meta charset=utf-8><title>Contact sheet</title><style>"
        "body{font:15px/1.4 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "td{vertical-align:top;padding:.4em;border-top:1px solid #ccc}</style>"
        f"<h1>Contact sheet</h1><p>{names}</p>{sheet_of(tables, num_rows, seed)}"
    )


def sheet_of(tables: dict[str, Table], num_rows: int, seed: int) -> str:
    """A table of up to ``num_rows`` rows that are ok, chosen by ``seed``.

    ``tables`` are ``images``, ``captions`` and, to show buckets, ``latents``.
    """
    check_aligned(list(tables.values()))
    rng = np.random.default_rng(seed)
    files = tables["images"].manifest.files
    blocks = [
        (k, group)
        for k, file in enumerate(files)
        for group in range(-(-sum(file.counts.values()) // ROW_GROUP_ROWS))
    ]
    chosen = [blocks[i] for i in sorted(rng.permutation(len(blocks))[:_BLOCKS])]
    lines: list[str] = []
    for place, (k, group) in enumerate(chosen):
        rows = [row for row in _read(tables, k, group) if row["status"] == OK]
        wanted = (num_rows - len(lines)) // (len(chosen) - place)
        lines += [_line(rows[i]) for i in sorted(rng.permutation(len(rows))[:wanted])]
    head = "<tr><th>picture<th>raw caption<th>dense captions<th>size<th>bucket"
    return f"<table>{head}{''.join(lines)}</table>"


def _read(tables: dict[str, Table], k: int, group: int) -> list[dict[str, object]]:
    columns = ["id", "bytes", "uri", "source", "raw_caption", "width", "height"]
    with tables["images"].file(k) as file:
        rows: pa.Table = file.read_row_group(group, columns)
    with tables["captions"].file(k) as file:
        said = file.read_row_group(group, ["status", "captions"])
    rows = rows.append_column("status", said["status"]).append_column("captions", said["captions"])
    if "latents" in tables:
        with tables["latents"].file(k) as file:
            shape = file.read_row_group(group, ["bucket_h", "bucket_w"])
        rows = rows.append_column("bucket_h", shape[0]).append_column("bucket_w", shape[1])
    found: list[dict[str, object]] = rows.to_pylist()
    return found


def _line(row: dict[str, object]) -> str:
    captions = row["captions"]
    assert isinstance(captions, list)
    try:
        picture = Image.fromarray(read_picture(row))
    except (PictureError, FileAbsent) as error:
        return f"<tr><td>{html.escape(str(row['source']))}<td colspan=4>{html.escape(str(error))}"
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=max(picture.size) < 64)
    data = base64.b64encode(buffer.getvalue()).decode()
    dense = "<br>".join(html.escape(caption) for caption in captions if caption)
    bucket = f"{row['bucket_h']} x {row['bucket_w']}" if "bucket_h" in row else ""
    return (
        f"<tr><td><img src='data:image/webp;base64,{data}' width=96 "
        f"alt='{html.escape(str(row['source']), quote=True)}'><td>"
        f"{html.escape(str(row['raw_caption'] or ''))}<td>{dense}<td>{row['width']} x "
        f"{row['height']}<td>{bucket}"
    )


def gather_tables(place: Folder) -> dict[str, Table]:
    """The tables to show with the one in ``place``: it, and the neighbours it lines up with.

    Raises ManifestError when it is no table of a pipeline, or its image table is not beside it.
    """
    first = Table.open(place)
    tables = {first.manifest.schema.partition("/")[0]: first}
    wanted = dict(first.manifest.inputs)
    images = wanted.get("images", first.digest)
    for name in place.parent.children():
        try:
            neighbour = Table.open(place.parent / name)
        except ManifestError:  # unfinished, or another version's
            continue
        kind = neighbour.manifest.schema.partition("/")[0]
        of_these = neighbour.manifest.inputs.get("images") == images
        if wanted.get(kind) == neighbour.digest or (of_these and kind not in tables):
            tables[kind] = neighbour
    missing = {"images", "captions"} - set(tables)
    if missing:
        raise ManifestError(
            f"{place.uri}: the {' and '.join(sorted(missing))} it was made from or into is not "
            f"beside it in {place.parent.uri}; give a captions or latents table of a run"
        )
    return {kind: tables[kind] for kind in ("images", "captions", "latents") if kind in tables}
