"""The listing of a source: every item, where its bytes and its caption lie, and its partition.

The driver looks through a source once and saves what it found as Arrow record batches, one a
partition, so that workers read their partition's in milliseconds (a Parquet footer of 50,000 row
groups takes 1.5 s each time). A source that grew gets the next generation of its listing: known
items keep their places, new ones come after them in new partitions. Tars and Parquet files that
have not changed are not opened again.
"""

import hashlib
import io
import json
import os
import posixpath
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby, islice, pairwise
from typing import IO, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixart_platform.errors import StorageError
from pixart_platform.storage import Entry, Folder, reading

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".png",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
CAPTION_KEYS = ("caption", "text", "prompt", "description")
METADATA = "metadata.jsonl"
GONE = "gone from the source"
WHOLE = -1
BROKEN = (  # what readers of tars and Parquet raise for bytes that are neither, to our knowledge
    tarfile.TarError, pa.ArrowException, ValueError, LookupError, OSError, OverflowError,
    RecursionError,
)  # fmt: skip
THREADS = 16
_AHEAD_BYTES = 4 << 20
_CAPTION_SUFFIXES = (".txt", ".json")
_COLUMNS = (  # of image, caption and label in a Parquet file: their names, and their types'
    (
        ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes"),
        r"(large_)?binary|struct<.*\bbytes: (large_)?binary",
    ),
    (CAPTION_KEYS, r"(large_)?(string|binary)|(large_)?list<\w+: (large_)?string"),
    (("label", "labels", "cls", "class"), "u?int"),
)
_HIDDEN = re.compile(r"(^|/)(\.(?!\.?[/\\])|__MACOSX/)")
_NO_DATA = re.compile(r"(^|/)[._]")  # _delta_log, _metadata and their like
_COMPRESSED = re.compile(r"\.t(ar\.)?(gz|bz2?|xz|zst|lz4|lzma)$", re.IGNORECASE)


class Item(NamedTuple):
    """An item of a source. Names are the store's own; bytes that are not UTF-8 are surrogates."""

    name: str  # what it is known by from one listing to the next
    file: str
    offset: int = WHOLE  # its first byte in the file, or its row of a Parquet file
    num_bytes: int = 0
    tag: str = ""  # changes with the bytes of the file
    caption: str = ""  # the name of what holds its caption
    caption_offset: int = WHOLE
    caption_bytes: int = 0
    caption_tag: str = ""
    label: int | None = None
    problem: str = ""


_PATHS = ("name", "file", "caption")  # bytes, as not all of them are text
_TYPES = {str: pa.large_string(), int: pa.int64(), int | None: pa.int32()}
_SCHEMA = pa.schema(
    (name, pa.large_binary() if name in _PATHS else _TYPES[kind])
    for name, kind in Item.__annotations__.items()
)


def to_table(items: Iterable[Item]) -> pa.Table:
    """Items as rows; only some at a time are Python objects."""
    items, chunks = iter(items), [_SCHEMA.empty_table()]
    while chunk := list(islice(items, 1 << 16)):
        columns = dict(zip(Item._fields, zip(*chunk, strict=True), strict=True))
        columns |= {name: tuple(map(os.fsencode, columns[name])) for name in _PATHS}
        chunks.append(pa.table(columns, _SCHEMA))
    return pa.concat_tables(chunks)


def to_items(rows: pa.Table | pa.RecordBatch) -> list[Item]:
    rows = rows.select(_SCHEMA.names).to_pylist()
    return [Item(**row | {name: os.fsdecode(row[name]) for name in _PATHS}) for row in rows]


def assign(previous: pa.Table, found: pa.Table, partition_rows: int) -> pa.Table:
    """The next listing: ``found`` with a ``partition`` column, known items in their old places.

    What is gone keeps its place and says so; what is new fills partitions after the last, sorted
    by file and place in it. Names are unique in both.
    """
    gone = previous.filter(pc.invert(pc.is_in(previous["name"], found["name"])))
    problem = pa.array([GONE] * len(gone), pa.large_string())
    gone = gone.drop(["partition", "problem"]).append_column("problem", problem)
    everything = pa.concat_tables([found, gone])
    known = everything.take(pc.index_in(previous["name"], everything["name"]))
    order = pc.sort_indices(found, [(name, "ascending") for name in ("file", "offset", "name")])
    is_new = pc.invert(pc.is_in(found["name"], previous["name"]))
    new = found.take(order.filter(is_new.take(order)))  # of millions, one copy
    first = 1 + (pc.max(previous["partition"]).as_py() if len(previous) else -1)
    partitions = pa.array(first + np.arange(len(new)) // partition_rows, pa.int32())
    known = known.append_column("partition", previous["partition"])
    return pa.concat_tables([known, new.append_column("partition", partitions)])


@dataclass(frozen=True)
class Listing:
    """A saved listing, cheap to send to workers."""

    folder: Folder
    file: str
    num_partitions: int

    def items(self, k: int) -> list[Item]:
        with self.folder.open(self.file) as file:
            return to_items(pa.ipc.open_file(file).get_batch(k))

    def parts(self) -> list[str]:
        """A digest a partition: of the source, and of its items' names, sizes, tags and labels."""
        with self.folder.open(self.file) as file:
            parts: list[str] = json.loads(pa.ipc.open_file(file).schema.metadata[b"parts"])
        return parts


def keep_listing(
    folder: Folder, source: str, partition_rows: int, look: Callable[[pa.Table], pa.Table]
) -> Listing:
    """The listing of what ``look`` finds, given the previous one; saved in ``folder`` if it is new.

    Of two writers of a generation one wins, and the other looks again at what that one saved.
    """
    while True:
        names = [entry.name for entry in folder.walk("listing-")]
        previous = _SCHEMA.append(pa.field("partition", pa.int32())).empty_table()
        if names:
            with folder.open(names[-1]) as file:
                previous = pa.ipc.open_file(file).read_all().replace_schema_metadata()
        listed = assign(previous, look(previous), partition_rows)
        num_partitions = listed["partition"][-1].as_py() + 1
        if listed.equals(previous):
            return Listing(folder, names[-1], num_partitions)
        name = f"listing-{len(names):05d}.arrow"
        if folder.create_once(name, _encode(listed, source, num_partitions)):
            return Listing(folder, name, num_partitions)


def _encode(listed: pa.Table, source: str, num_partitions: int) -> bytes:
    bounds = np.searchsorted(listed["partition"].to_numpy(), np.arange(num_partitions + 1))
    slices = (listed[first:last] for first, last in pairwise(bounds.tolist()))
    batches = [rows.combine_chunks().to_batches()[0] for rows in slices]
    parts = json.dumps([_digest(source, batch) for batch in batches])
    sink, schema = pa.BufferOutputStream(), listed.schema.with_metadata({"parts": parts})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _digest(source: str, batch: pa.RecordBatch) -> str:
    content = batch.drop_columns(["offset", "caption_offset", "partition"]).to_pydict()
    return hashlib.sha256(repr((source, content)).encode()).hexdigest()[:16]


def look_through(kind: str, folder: Folder, only: str, previous: pa.Table) -> pa.Table:
    """All items of a source as rows; ``only`` names the one file it consists of, if it is one.

    Raises StorageError when there are none, so that a store that is not mounted does not pass for
    one that was emptied.
    """
    if kind in ("tar", "parquet"):
        found = _find_packed(kind, folder, only, previous)
    else:
        classes = kind == "classes"
        found = to_table(_find_classes(folder, previous) if classes else _find_captioned(folder))
    if pc.all(pc.equal(found["file"], METADATA.encode()), min_count=0).as_py():  # only its lines
        sought = f".{kind}" if kind in ("tar", "parquet") else ", ".join(IMAGE_SUFFIXES)
        raise StorageError(f"no such place, or no images in it (files that end in {sought})")
    return found


@lru_cache(1 << 10)
def split_name(name: str) -> tuple[str, str, str]:
    """Stem (all before the last dot), key (all before the base's first), suffix in lower case."""
    head, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    key = head + slash + base.partition(".")[0]
    return (head + slash + stem, key, f".{suffix.lower()}") if dot else (name, key, "")


def _walk(folder: Folder, suffixes: tuple[str, ...]) -> Iterator[Item]:
    for entry in folder.walk():
        if split_name(entry.name)[2] in suffixes and not _HIDDEN.search(entry.name):
            yield Item(entry.name, entry.name, num_bytes=entry.num_bytes, tag=tag_of(entry))


def _find_captioned(folder: Folder) -> Iterator[Item]:
    """Images with ``NAME.txt`` or ``NAME.json`` beside them, or a line of ``metadata.jsonl``."""
    lines, matched = _index_lines(folder), {""}  # blank lines
    items = _walk(folder, IMAGE_SUFFIXES + _CAPTION_SUFFIXES)
    # Sorted, so what begins alike is together: of a key alone it is not, a.b/c lies in its midst.
    for _, together in groupby(items, key=lambda item: item.name.partition(".")[0]):
        for item in _pair(list(together)):
            name = _normalize(item.name)
            matched |= {name} & lines.keys()
            yield item if item.caption or name not in lines else _with_caption(item, lines[name])
    for name in lines.keys() - matched:
        yield lines[name]._replace(name=name, problem=f"no such image (in {METADATA} alone)")


def _pair(items: list[Item]) -> Iterator[Item]:
    """The images among ``items``, with the place of the caption and the label of the same name.

    The name is all before the last dot or, as in WebDataset, all before the first.
    """
    beside = {split_name(item.name)[::2]: item for item in items} if len(items) > 1 else {}
    for item in items:
        stem, key, suffix = split_name(item.name)
        if suffix in IMAGE_SUFFIXES:
            caption, label = (
                next((beside[b, e] for b in (stem, key) for e in ends if (b, e) in beside), None)
                for ends in (_CAPTION_SUFFIXES, (".cls",))
            )
            found = item
            if label:
                problem = item.problem or label.problem
                found = item._replace(label=label.label, problem=problem)
            yield _with_caption(found, caption) if caption else found


def _with_caption(item: Item, its: Item) -> Item:
    return item._replace(
        caption=its.name, caption_offset=its.offset, caption_bytes=its.num_bytes,
        caption_tag=its.tag, problem=item.problem or its.problem,
    )  # fmt: skip


def _index_lines(folder: Folder) -> dict[str, Item]:
    """The lines of ``metadata.jsonl`` by the image that they describe. Raises StorageError."""
    lines: dict[str, Item] = {}
    if folder.find(METADATA) is None:
        return lines
    with reading(folder, METADATA), folder.open(METADATA) as file:
        offset = 0
        for number, line in enumerate(file, 1):
            try:
                name = _normalize(json.loads(line)["file_name"]) if line.strip() else ""
                os.fsencode(name)  # JSON can spell surrogates, which no name holds
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise StorageError(
                    f"line {number} of {METADATA} is no JSON object with file_name; correct it"
                ) from error
            lines[name] = Item(METADATA, METADATA, offset, len(line), tag_of_line(line))
            offset += len(line)
    return lines


def _normalize(name: str) -> str:
    """One spelling for ``./a`` and ``a``, and for letters with their accents apart or together."""
    return unicodedata.normalize("NFC", posixpath.normpath(name))


def tag_of_line(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]


def _find_classes(folder: Folder, previous: pa.Table) -> Iterator[Item]:
    """Images labelled by the sorted place of their class, the first folder of their name.

    A class keeps its label; those that come later follow, sorted among themselves.
    """
    ones = previous.group_by("label").aggregate([("name", "min")]).to_pylist()
    known = {os.fsdecode(one["name_min"]).partition("/")[0]: one["label"] for one in ones}
    labels = {name: label for name, label in known.items() if label is not None}
    first = max(labels.values(), default=-1) + 1
    new = {name for name in folder.children() if not _HIDDEN.search(f"{name}/")} - labels.keys()
    labels |= {name: first + k for k, name in enumerate(sorted(new))}
    for item in _walk(folder, IMAGE_SUFFIXES):
        yield item._replace(label=labels.get(item.name.partition("/")[0]))


def tag_of(entry: Entry) -> str:
    """The tag of all that a file holds."""
    return f"{entry.num_bytes}-{entry.tag}"


def _find_packed(kind: str, folder: Folder, only: str, previous: pa.Table) -> pa.Table:
    """Items in tars or Parquet files; of files that have not changed, those of ``previous``."""
    walked = filter(None, [folder.find(only)]) if only else folder.walk()
    entries = {e.name: e for e in walked if not _NO_DATA.search(e.name)}
    for name in entries if kind == "tar" else ():
        if _COMPRESSED.search(name):
            raise StorageError(
                f"{name} is compressed, so nothing can be read from its middle; decompress it "
                f"(pictures hardly shrink anyway)"
            )
    tags = {name: tag_of(e) for name, e in entries.items() if split_name(name)[2] == f".{kind}"}
    previous = previous.filter(pc.not_equal(previous["problem"], GONE)).select(_SCHEMA.names)
    files = previous.group_by(["file", "tag"]).aggregate([]).to_pylist()
    same = {f["file"] for f in files if tags.get(os.fsdecode(f["file"])) == f["tag"]}
    changed = [entries[name] for name in tags if os.fsencode(name) not in same]
    kept = previous.filter(pc.is_in(previous["file"], pa.array(same, pa.large_binary())))
    with ThreadPoolExecutor(THREADS) as pool:
        return pa.concat_tables([kept, *pool.map(partial(_index_file, kind, folder), changed)])


def _index_file(kind: str, folder: Folder, entry: Entry) -> pa.Table:
    """The items of a tar or Parquet file, and one more to say so if it is broken somewhere."""
    whole = Item(entry.name, entry.name, num_bytes=entry.num_bytes, tag=tag_of(entry))
    found, faults = list[Item](), list[Item]()
    try:
        with reading(folder, entry.name), folder.open(entry.name) as file:
            for item in (_index_tar if kind == "tar" else _index_rows)(file, whole):
                found.append(item)  # one by one: what came before a fault is kept
    except BROKEN as error:
        faults = [whole._replace(problem=f"broken {kind} file ({printable(str(error))})")]
    return to_table([*(_pair(found) if kind == "tar" else found), *faults])


def _index_tar(file: IO[bytes], whole: Item) -> Iterator[Item]:
    """Members of a tar that are files. None is ever unpacked; names that lead out are refused."""
    times: Counter[str] = Counter()
    file = io.BufferedReader(cast(io.RawIOBase, file), _AHEAD_BYTES)  # in few requests
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while member := archive.next():
            if member.size < 0:
                raise tarfile.ReadError(f"damaged header before byte {member.offset_data}")
            name, problem, label = member.name.removeprefix("./"), "", None
            if member.isdir() or _HIDDEN.search(name):
                continue
            if name.startswith("/") or ".." in re.split(r"[/\\]", name):
                problem = "unsafe name in a tar"
            elif not member.isreg() or member.issparse():
                problem = "not a plain file in a tar (a link, a device or sparse)"
            elif split_name(name)[2] == ".cls":
                file.seek(member.offset_data)
                label, problem = _read_label(name, file.read(min(member.size, 32)))
            times[name] += 1  # a tar that was appended to may hold a name twice
            place = f"{whole.file}#{times[name]}" if times[name] > 1 else whole.file
            yield Item(
                f"{place}/{name}", whole.file, member.offset_data, member.size, whole.tag,
                label=label, problem=problem,
            )  # fmt: skip
            if member.offset_data + member.size > whole.num_bytes:
                raise tarfile.ReadError("cut off")
        file.seek(archive.offset)  # tarfile stops at whatever is no header, without a word
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged header at byte {archive.offset}")


def _read_label(name: str, data: bytes) -> tuple[int | None, str]:
    if re.fullmatch(rb"\s*-?\d{1,9}\s*", data):
        return int(data), ""
    return None, f"unreadable label ({printable(name)}: not a number)"


def _index_rows(file: IO[bytes], whole: Item) -> Iterator[Item]:
    parquet = pq.ParquetFile(file)
    _, caption, _ = columns_of(parquet.schema_arrow, whole.file)
    num_rows = parquet.metadata.num_rows
    if num_rows > whole.num_bytes:
        raise ValueError(f"{num_rows} rows in {whole.num_bytes} bytes")
    for row in range(num_rows):
        yield Item(f"{whole.file}:{row}", whole.file, row, tag=whole.tag, caption=caption or "")


def columns_of(schema: pa.Schema, name: str) -> list[str | None]:
    """The columns of image, caption and label. Raises StorageError without an image."""
    types = {field.name: str(field.type) for field in schema}
    columns = [
        next((n for n in names if re.match(kind, types.get(n, "none"))), None)
        for names, kind in _COLUMNS
    ]
    if columns[0] is None:
        raise StorageError(
            f"{name} has no column of image bytes; call it one of {', '.join(_COLUMNS[0][0])} "
            f"(it has {', '.join(types)})"
        )
    return columns


def printable(text: str) -> str:
    """With what is not UTF-8 escaped: tables hold UTF-8 only."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")
