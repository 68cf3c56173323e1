"""Sources: where images come from, cut into partitions deterministically.

A source answers two questions anywhere in a cluster: how many partitions there are, and what the
raw items of partition k are. It decodes nothing; ``ingest`` does, and nothing is dropped here: what
is broken is an item with a problem. That verdict is for good, so what may be well tomorrow (no
permission, a sick disk, a file that changed) is an error. Tars are read where they lie, in few long
reads.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import IO, Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixart_jobs import listing
from pixart_jobs.crowd_scenes import compose_crowd
from pixart_jobs.listing import WHOLE, Item, Listing, printable
from pixart_jobs.recipe import SAMPLES, DataSettings
from pixart_jobs.scenes import Scene, compose_scene
from pixart_platform.errors import StorageError
from pixart_platform.recipe import digest_of
from pixart_platform.storage import CHANGED, FileAbsent, Folder, open_folder, reading

_MAX_BYTES = 1 << 28  # of one image or caption file
_SPAN_BYTES = 64 << 20  # of one read
_GAP_BYTES = 1 << 20  # rather read along than asked around
_BATCH_ROWS = 64


@dataclass(frozen=True)
class RawItem:
    """One item as found: its bytes or why they could not be read, and what came with it."""

    source: str
    data: bytes
    raw_caption: str = ""
    label: int | None = None
    truth: str | None = None
    problem: str = ""
    uri: str = ""  # what ``fetch`` reads its bytes by again; empty if nothing can


class Source(Protocol):
    """A partitioned set of raw items."""

    @property
    def num_partitions(self) -> int: ...

    def parts(self) -> list[str]:
        """What each partition is made from: equal if its content is, and only then."""
        ...

    def fingerprint(self) -> str:
        """Changes when the source's content does."""
        ...

    def read(self, k: int) -> list[RawItem]:
        """Partition ``k``. Raises StorageError if a file cannot be read or has changed."""
        ...


@dataclass(frozen=True)
class SampleScenes:
    """Sample scenes of a kind, digits or crowds, composed where they are read."""

    kind: str
    num_scenes: int
    partition_rows: int
    seed: int

    @property
    def num_partitions(self) -> int:
        return -(-self.num_scenes // self.partition_rows)

    def _rows(self, k: int) -> range:
        return range(self.num_scenes)[k * self.partition_rows : (k + 1) * self.partition_rows]

    def parts(self) -> list[str]:
        return [f"{self.kind}:{self.seed}:{self._rows(k)}" for k in range(self.num_partitions)]

    def fingerprint(self) -> str:
        return f"{self.kind}:{self.seed}:{self.num_scenes}"

    def read(self, k: int) -> list[RawItem]:
        compose: Callable[..., Scene[Any]] = (
            compose_crowd if self.kind == "crowds" else compose_scene
        )
        scenes = ((i, compose(i, seed=self.seed)) for i in self._rows(k))
        return [
            RawItem(f"{self.kind}:{i}", s.png(), s.raw_caption, s.label, s.truth())
            for i, s in scenes
        ]


class Found(NamedTuple):
    """What was read of an item: bytes, or why there are none."""

    image: bytes | str
    caption: bytes | str | None = None
    label: int | None = None


@dataclass(frozen=True)
class Collection:
    """Images in a folder's files, tars or Parquet tables, as its saved listing has them."""

    kind: str
    folder: Folder
    listing: Listing

    @property
    def num_partitions(self) -> int:
        return self.listing.num_partitions

    def parts(self) -> list[str]:
        return self.listing.parts()

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(self.parts()).encode()).hexdigest()[:16]

    def read(self, k: int) -> list[RawItem]:
        items = self.listing.items(k)
        sound = [item for item in items if not item.problem]
        found = (read_rows if self.kind == "parquet" else read_files)(self.folder, sound)
        self._require_unchanged(sound)  # after they were read: what changes from now on is not here
        return [self._raw_item(item, found.get(item.name, Found(""))) for item in items]

    def _require_unchanged(self, items: list[Item]) -> None:
        beside = {i.caption: i.caption_tag for i in items if i.caption_offset == WHOLE}
        tags = {item.file: item.tag for item in items}
        tags |= {name: tag for name, tag in beside.items() if tag}

        def check(name: str) -> None:
            with reading(self.folder, name):
                entry = self.folder.find(name)
                if entry is None or listing.tag_of(entry) != tags[name]:
                    raise FileAbsent(name)

        with ThreadPoolExecutor(listing.THREADS) as pool:
            list(pool.map(check, tags))

    def _raw_item(self, item: Item, found: Found) -> RawItem:
        name, caption, problem = printable(item.name), "", printable(item.problem)
        if isinstance(found.image, str):
            problem = problem or f"unreadable file ({found.image})"
            return RawItem(name, b"", label=item.label, problem=problem)
        try:
            missing = found.caption is None
            caption = self._words_of(item) if missing else read_caption(item, found.caption)
        except (ValueError, RecursionError) as error:
            problem = printable(f"unreadable caption ({item.caption.rpartition('/')[2]}: {error})")
        label = item.label if found.label is None else found.label
        if label is not None and not -(2**31) <= label < 2**31:
            label, problem = None, f"unreadable label ({label} is over 32 bits)"
        return RawItem(name, found.image, caption, label, None, problem, self._uri_of(item))

    def _words_of(self, item: Item) -> str:
        """The words of a file's name, or of its class; names in tars are numbers."""
        head, _, base = item.name.rpartition("/")
        name = {"folder": listing.split_name(base)[0], "classes": head.partition("/")[0]}
        return " ".join(re.findall(r"[^\W_]+", printable(name.get(self.kind, ""))))

    def _uri_of(self, item: Item) -> str:
        uri = f"{self.folder.uri.rstrip('/')}/{item.file}"
        if self.kind == "parquet" or printable(uri) != uri:
            return ""
        return uri if item.offset == WHOLE else f"{uri}#offset={item.offset}&size={item.num_bytes}"


def read_caption(item: Item, data: bytes | str | None) -> str:
    """A caption from a text, a JSON document or a line of one.

    Raises ValueError for what is none, RecursionError for a document too deep to read, and
    StorageError if the line is not the one that was listed.
    """
    if not isinstance(data, bytes):
        raise ValueError(data)
    if item.caption == listing.METADATA and listing.tag_of_line(data) != item.caption_tag:
        raise StorageError(f"{item.caption} {CHANGED}")
    text = data.decode("utf-8-sig")
    if not item.caption.lower().endswith((".json", ".jsonl")):
        return text.strip()
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    found = [document[key] for key in listing.CAPTION_KEYS if key in document]
    if not found and not {"image", "annotations"} <= document.keys():  # SAM's masks say nothing
        raise ValueError(f"none of {', '.join(listing.CAPTION_KEYS)} in it")
    value = next((value for value in found if value is not None), None)
    value = next(iter(value), None) if isinstance(value, list) else value  # the first of several
    if not isinstance(value, str | None):
        raise ValueError(f"its caption is not text but {value!r:.60}")
    (value or "").encode()  # JSON can spell surrogates, which tables cannot hold
    return (value or "").strip()


class Blob(NamedTuple):
    """Some bytes of a file, or all."""

    file: str
    offset: int
    num_bytes: int


def _blobs_of(item: Item) -> list[Blob]:
    """Where its image is, and its caption if it has one: in the same tar or in a file."""
    image = Blob(item.file, item.offset, item.num_bytes)
    place = item.caption if item.offset == WHOLE else item.file
    return [image, Blob(place, item.caption_offset, item.caption_bytes)][: 1 + bool(item.caption)]


def plan_reads(blobs: Iterable[Blob]) -> Iterator[list[Blob]]:
    """Blobs that one read brings: neighbours in a file, up to 64 MiB with the gaps between."""
    together: list[Blob] = []
    end = 0
    for blob in sorted(blobs):
        if together and (
            blob.offset == WHOLE
            or blob.file != together[0].file
            or blob.offset > end + _GAP_BYTES
            or blob.offset + blob.num_bytes > together[0].offset + _SPAN_BYTES
        ):
            yield together
            together = []
        together.append(blob)
        end = blob.offset + blob.num_bytes
    if together:
        yield together


def read_files(folder: Folder, items: list[Item]) -> dict[str, Found]:
    """Images and captions by item. Raises StorageError."""
    plan = plan_reads({blob for item in items for blob in _blobs_of(item)})
    found: dict[Blob, Any] = {}
    with ThreadPoolExecutor(listing.THREADS) as pool:
        for read in pool.map(partial(_read_together, folder), plan):
            found |= read
    return {item.name: Found(*(found[blob] for blob in _blobs_of(item))) for item in items}


def _read_together(folder: Folder, blobs: list[Blob]) -> dict[Blob, bytes | str]:
    if blobs[0].num_bytes > _MAX_BYTES:
        return {blobs[0]: f"{blobs[0].num_bytes} bytes are over {_MAX_BYTES}"}
    data = _read(folder, blobs)
    if blobs[0].offset == WHOLE:
        return {blobs[0]: data}
    starts = [blob.offset - blobs[0].offset for blob in blobs]
    return {b: data[a : a + b.num_bytes] for a, b in zip(starts, blobs, strict=True)}


def _read(folder: Folder, blobs: list[Blob]) -> bytes:
    file, start, _ = blobs[0]
    with reading(folder, file):
        if start == WHOLE:
            return folder.read(file)
        with folder.open(file) as opened:
            opened.seek(start)
            return opened.read(blobs[-1].offset + blobs[-1].num_bytes - start)


def fetch(uri: str) -> bytes:
    """An item's bytes again, by its ``uri``. Raises StorageError; FileAbsent if they are gone."""
    match = re.fullmatch(r"(s3://[^/]+/|/)(.*?)(?:#offset=(\d+)&size=(\d+))?", uri, re.DOTALL)
    if match is None:
        raise StorageError(f"{uri!r} does not say where a picture is; ingest with copy_bytes")
    root, name, offset, size = match.groups()
    return _read(open_folder(root), [Blob(name, int(offset or WHOLE), int(size or 0))])


def read_rows(folder: Folder, items: list[Item]) -> dict[str, Found]:
    """Rows of Parquet files by item. Raises StorageError for what is no fault of their bytes."""
    found: dict[str, Found] = {}
    for file, group in groupby(items, key=lambda item: item.file):
        names = {item.offset: item.name for item in group}
        reason = "no such row"
        try:
            with reading(folder, file), folder.open(file) as opened:
                for row, values in _stream_rows(opened, file, min(names), max(names) + 1):
                    if row in names:
                        found[names.pop(row)] = values
        except listing.BROKEN as error:
            reason = f"broken parquet file: {printable(str(error))}"
        found |= dict.fromkeys(names.values(), Found(reason))
    return found


def _stream_rows(
    opened: IO[bytes], file: str, first: int, last: int
) -> Iterator[tuple[int, Found]]:
    """Rows from ``first`` to before ``last`` and some around: row groups may be over memory."""
    table = pq.ParquetFile(opened)
    columns = listing.columns_of(table.schema_arrow, file)
    sizes = [table.metadata.row_group(g).num_rows for g in range(table.num_row_groups)]
    starts = [0, *accumulate(sizes)]
    groups = [g for g in range(len(sizes)) if starts[g] < last and starts[g + 1] > first]
    names, row = [name for name in columns if name], starts[groups[0]]
    for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups, columns=names):
        if row < last and row + len(batch) > first:
            empty = [None] * len(batch)
            values = (_to_values(batch[name]) if name else empty for name in columns)
            found = (
                Found(image or "no image in its row", *more)
                for image, *more in zip(*values, strict=True)
            )
            yield from enumerate(found, row)
        row += len(batch)


def _to_values(column: pa.Array) -> list[Any]:
    """Bytes, of text too as it need not be UTF-8; the first of several captions; numbers."""
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.binary_join(pc.list_slice(column, 0, 1), "")
    if not pa.types.is_integer(column.type):
        column = column.cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return values


def open_source(settings: DataSettings, seed: int, keep: Folder) -> Source:
    """The source a recipe names, as it is now; its listing is saved under ``keep``.

    Raises StorageError when there is nothing in it, it cannot be listed, or ``keep`` is in it.
    """
    if settings.source in SAMPLES:
        return SampleScenes(settings.source, settings.num_scenes, settings.partition_rows, seed)
    kind, _, uri = settings.source.partition(":")
    try:
        folder, only = open_folder(uri), ""
        if kind in ("tar", "parquet") and next(folder.walk(), None) is None:
            folder, only = folder.parent, folder.name
        if kind != "tar" and not only and _place_of(keep).startswith(_place_of(folder)):
            raise StorageError(
                f"{keep.uri}, which the tables go to, lies inside, so that our own pictures would "
                f"be taken for new ones; set --root or data.store to a place outside"
            )
        place, rows = f"{kind}:{folder.uri}/{only}", settings.partition_rows
        kept = keep / f"source-{digest_of({'listing': 1, 'source': place, 'rows': rows})[:8]}"
        look = partial(listing.look_through, kind, folder, only)
        return Collection(kind, folder, listing.keep_listing(kept, place, rows, look))
    except StorageError as error:
        raise StorageError(f"data.source = {settings.source}: {error}") from error


def _place_of(folder: Folder) -> str:
    return (folder.uri if "://" in folder.uri else os.path.realpath(folder.uri)).rstrip("/") + "/"
