"""Tables: folders of ``part-00017-<digest>.parquet`` files with a manifest, aligned row by row.

Partition k of every table holds the same ids in the same order as partition k of the image table,
rejected rows included (empty payload, ``status`` says why), so a join is a zip and nothing is lost
or doubled. A partition is finished when its record is; redoing a job redoes only the others. A
partition's key says what it was made from, so when a source grows, every later table takes over the
partitions that it has already and makes the new ones.

Payloads are plain binary columns, uncompressed: latents and bf16 features do not compress, and
tensor-extension columns carry metadata we will not trust (CVE-2026-41486).
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pixart_platform.errors import ManifestError, StorageError
from pixart_platform.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    load_manifest,
    verify_folder,
)
from pixart_platform.recipe import digest_of
from pixart_platform.storage import Folder, LocalFolder, open_folder

OK = "ok"
ROW_GROUP_ROWS = 256
_RECORDS = "_records/"
_RECORD_THREADS = 16
_log = logging.getLogger(__name__)

_ID = [pa.field("id", pa.string()), pa.field("status", pa.string())]
SCHEMAS: dict[str, pa.Schema] = {
    "images/2": pa.schema(
        [
            *_ID,
            pa.field("source", pa.string()),
            pa.field("uri", pa.string()),  # where the bytes are, when they are not in the table
            pa.field("bytes", pa.binary()),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("raw_caption", pa.string()),
            pa.field("label", pa.int32()),
            pa.field("quality", pa.float32()),
            pa.field("phash", pa.uint64()),
            pa.field("truth", pa.string()),
        ]
    ),
    "selection/1": pa.schema(_ID),
    "captions/2": pa.schema([*_ID, pa.field("captions", pa.list_(pa.string()))]),
    "text/2": pa.schema(  # features of all captions of a row, one after the other
        [
            *_ID,
            pa.field("features", pa.large_binary()),
            pa.field("num_tokens", pa.list_(pa.int32())),
        ]
    ),
    "latents/1": pa.schema(
        [
            *_ID,
            pa.field("moments", pa.binary()),
            pa.field("bucket_h", pa.int32()),
            pa.field("bucket_w", pa.int32()),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
        ]
    ),
    "drawings/1": pa.schema(
        [
            *_ID,
            pa.field("prompt", pa.string()),
            pa.field("seed", pa.int64()),
            pa.field("png", pa.binary()),
        ]
    ),
    "judgements/1": pa.schema(  # of drawings or references: what was seen as JSON, fp32 features
        [*_ID, pa.field("seen", pa.string()), pa.field("features", pa.binary())]
    ),
}


def _encode_parquet(rows: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows, sink, row_group_size=ROW_GROUP_ROWS, compression="none", use_dictionary=False,
        write_statistics=False,
    )  # fmt: skip
    return sink.getvalue()


def count_statuses(rows: pa.Table) -> dict[str, int]:
    """Rows by status; of a reason the words before the first number or parenthesis count."""
    counts: dict[str, int] = {}
    for entry in pc.value_counts(rows["status"]).to_pylist():
        reason = re.split(r"\s*[(\d]", entry["values"])[0]
        counts[reason] = counts.get(reason, 0) + entry["counts"]
    return dict(sorted(counts.items()))


@dataclass(frozen=True)
class TableWriter:
    """Writes one table, partition by partition, from any process, and commits it once.

    ``folder`` must be this table's own: its name carries ``digest_of(settings, inputs)``, so other
    settings never meet old partitions. ``keys`` name what each partition is made from; equal keys
    mean equal work, and ``adopt`` takes it over.
    """

    folder: Folder
    schema: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    keys: tuple[str, ...]

    @classmethod
    def under(
        cls,
        root: Folder,
        name: str,
        schema: str,
        settings: dict[str, Any],
        inputs: Mapping[str, "Table"],
        parts: Sequence[str] = (),
    ) -> "TableWriter":
        """The writer of ``root/name-<digest>``, where digest names the settings and inputs.

        A partition is made from its number's files of the inputs, or from what ``parts`` names; of
        ``settings`` those that begin with ``_`` name what all the parts make up.
        """
        digests = {kind: table.digest for kind, table in inputs.items()}
        digest = digest_of({"schema": schema, "settings": settings, "inputs": digests})
        asked = {key: value for key, value in settings.items() if not key.startswith("_")}
        made_from = zip(*(t.manifest.files for t in inputs.values()), strict=True)
        parts = parts or ["".join(f.sha256 for f in files) for files in made_from]
        keys = (digest_of({"schema": schema, "settings": asked, "part": part}) for part in parts)
        return cls(root / f"{name}-{digest[:8]}", schema, settings, digests, tuple(keys))

    @property
    def num_partitions(self) -> int:
        return len(self.keys)

    @property
    def is_committed(self) -> bool:
        return self.folder.find(MANIFEST_FILE) is not None

    def written(self) -> set[int]:
        """Finished partitions: those whose record, written last, is there."""
        names = (
            re.fullmatch(rf"{_RECORDS}(\d+)\.json", e.name) for e in self.folder.walk(_RECORDS)
        )
        return {int(match[1]) for match in names if match}

    def is_written(self, k: int) -> bool:
        return self.folder.find(_record_name(k)) is not None

    def adopt(self) -> int:
        """Take over unwritten partitions that committed neighbours made from the same; how many.

        A neighbour is a table of the same kind beside this one. Its files stay where they are.
        """
        kind = self.folder.name.rpartition("-")[0]
        missing = set(range(self.num_partitions)) - self.written()
        known: dict[str, FileRecord] = {}
        for name in self.folder.parent.children() if missing else []:
            if name.rpartition("-")[0] == kind and name != self.folder.name:
                with suppress(ManifestError):  # unfinished or damaged
                    known |= {
                        record.key: replace(record, folder=record.folder or name)
                        for record in load_manifest(self.folder.parent / name).files
                    }
        adopted = [k for k in sorted(missing) if self.keys[k] in known]
        with ThreadPoolExecutor(_RECORD_THREADS) as pool:
            done = pool.map(lambda k: self._record(k, known[self.keys[k]]), adopted)
        return len([*done])

    def write(self, k: int, rows: pa.Table) -> None:
        """Write partition ``k`` whole: data first, record last.

        The data's name carries its digest and the first record stays, so that of two writers of a
        partition one is believed and the other's file is deleted.
        """
        exact = rows.select(SCHEMAS[self.schema].names).cast(SCHEMAS[self.schema])
        data = _encode_parquet(exact)
        digest = hashlib.sha256(data).hexdigest()
        name = f"part-{k:05d}-{digest[:8]}.parquet"
        self.folder.write(name, memoryview(data))
        record = FileRecord(name, data.size, digest, count_statuses(exact), self.keys[k])
        if not self._record(k, record) and self._read_record(k).name != name:
            _log.warning("%s: another writer finished partition %d first", self.folder.uri, k)
            self.folder.delete(name)

    def _record(self, k: int, record: FileRecord) -> bool:
        return self.folder.create_once(_record_name(k), json.dumps(asdict(record)).encode())

    def _read_record(self, k: int) -> FileRecord:
        try:
            return FileRecord(**json.loads(self.folder.read(_record_name(k))))
        except (StorageError, ValueError, TypeError) as error:
            raise ManifestError(
                f"{self.folder.uri}/{_record_name(k)}: {error}; run the job again"
            ) from error

    def commit(self, extra: dict[str, Any] | None = None) -> "Table":
        """Write the manifest over all partitions' records; the table now exists."""
        with ThreadPoolExecutor(_RECORD_THREADS) as pool:
            records = tuple(pool.map(self._read_record, range(self.num_partitions)))
        Manifest(self.schema, self.settings, self.inputs, records, extra or {}).commit_to(
            self.folder
        )
        return Table.open(self.folder)


def _record_name(k: int) -> str:
    return f"{_RECORDS}{k:05d}.json"


@dataclass(frozen=True)
class Table:
    """A committed table."""

    folder: Folder
    manifest: Manifest

    @classmethod
    def open(cls, place: str | Path | Folder) -> "Table":
        """Open a table. Raises ManifestError without a manifest, or with an unknown schema's."""
        folder = open_folder(place)
        manifest = load_manifest(folder)
        if manifest.schema not in SCHEMAS:
            raise ManifestError(
                f"{folder.uri}: holds {manifest.schema}, which this version does not know; it "
                f"knows {', '.join(SCHEMAS)}. Run its job again"
            )
        return cls(folder, manifest)

    @property
    def num_partitions(self) -> int:
        return len(self.manifest.files)

    @cached_property
    def digest(self) -> str:
        return self.manifest.digest

    def file(self, k: int) -> pq.ParquetFile:
        """Partition ``k``, to read row groups of. Raises ManifestError if it cannot be read."""
        record = self.manifest.files[k]
        home = record.home(self.folder)
        try:
            if isinstance(home, LocalFolder):
                return pq.ParquetFile(home.path / record.name, memory_map=True)
            return pq.ParquetFile(home.open(record.name), pre_buffer=True)
        except (StorageError, OSError, pa.ArrowInvalid) as error:
            raise ManifestError(
                f"{home.uri}/{record.name}: cannot be read ({error}); restore it"
            ) from error

    def read(self, k: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Partition ``k``, whole or some columns. Raises ManifestError if it cannot be read."""
        with self.file(k) as file:
            try:
                return file.read(columns=list(columns) if columns else None)
            except (StorageError, OSError, pa.ArrowInvalid) as error:
                raise ManifestError(
                    f"{self.folder.uri}: partition {k} cannot be read ({error}); restore it"
                ) from error


def verify_table(place: str | Path | Folder) -> Manifest:
    """Check every byte, row count and id of a table. Raises ManifestError naming the first fault.

    Ids of rows that are ok must be unique, over the whole table, where it says which are chosen.
    """
    table = Table.open(place)
    manifest = verify_folder(table.folder)
    seen: list[NDArray[np.uint64]] = []
    for k, record in enumerate(manifest.files):
        rows = table.read(k, ["id", "status"])
        if count_statuses(rows) != record.counts:
            raise ManifestError(f"{table.folder.uri}: partition {k} has not the rows it lists")
        chosen = rows.filter(pc.equal(rows["status"], OK))["id"].to_pylist()
        seen.append(np.array([int(i[:16], 16) for i in chosen], np.uint64))
    ids = np.sort(np.concatenate(seen)) if seen else np.zeros(0, np.uint64)
    if not manifest.schema.startswith("images/") and (twice := ids[1:][ids[1:] == ids[:-1]]).size:
        raise ManifestError(
            f"{table.folder.uri}: two rows that are ok have an id that begins {twice[0]:016x}"
        )
    return manifest


@lru_cache(maxsize=16)
def open_cached(uri: str) -> Table:
    """A table that a process reads again and again, opened once. Raises ManifestError."""
    return Table.open(uri)


def find_rejects(
    images: Table, table: Table, earlier: Table | None = None
) -> Iterator[dict[str, str]]:
    """Source, id and status of every row that ``table`` rejected and ``earlier`` had not."""
    for k, record in enumerate(table.manifest.files):
        if set(record.counts) <= {OK}:
            continue
        rows = table.read(k, ["id", "status"])
        found = pc.not_equal(rows["status"], OK)
        if earlier:
            found = pc.and_(found, pc.equal(earlier.read(k, ["status"])["status"], OK))
        named = rows.append_column("source", images.read(k, ["source"])["source"])
        yield from named.filter(found).to_pylist()


def check_aligned(tables: Sequence[Table]) -> None:
    """Raise ManifestError unless all tables have the same rows, of the same image table."""
    first = tables[0]
    images = {t.digest for t in tables if t.manifest.schema.startswith("images/")}
    images |= {t.manifest.inputs["images"] for t in tables if "images" in t.manifest.inputs}
    if len(images) > 1:
        names = ", ".join(t.folder.name for t in tables)
        raise ManifestError(f"{names} were made from different image tables; make them from one")
    for other in tables[1:]:
        rows = [[sum(f.counts.values()) for f in t.manifest.files] for t in (first, other)]
        if rows[0] != rows[1]:
            raise ManifestError(
                f"{other.folder.uri} does not line up with {first.folder.uri}: partitions or rows "
                f"differ; make both from the same image table"
            )
