"""Tables: folders of ``part-00017.parquet`` files with a manifest, aligned row by row.

Partition k of every table holds the same ids in the same order as partition k of the image table,
rejected rows included (empty payload, ``status`` says why), so a join is a zip and nothing is lost
or doubled. A partition is finished when its record is; redoing a job redoes only the others.

Payloads are plain binary columns, uncompressed: latents and bf16 features do not compress, and
tensor-extension columns carry metadata we will not trust (CVE-2026-41486).
"""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixart_platform.errors import ManifestError
from pixart_platform.manifest import MANIFEST_FILE, FileRecord, Manifest, load_manifest
from pixart_platform.recipe import digest_of
from pixart_platform.storage import write_atomic

OK = "ok"
ROW_GROUP_ROWS = 256

_ID = [pa.field("id", pa.string()), pa.field("status", pa.string())]
SCHEMAS: dict[str, pa.Schema] = {
    "images/1": pa.schema(
        [
            *_ID,
            pa.field("source", pa.string()),
            pa.field("bytes", pa.binary()),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("raw_caption", pa.string()),
            pa.field("label", pa.int32()),
            pa.field("quality", pa.float32()),
            pa.field("truth", pa.string()),
        ]
    ),
    "captions/1": pa.schema([*_ID, pa.field("caption", pa.string())]),
    "text/1": pa.schema(
        [*_ID, pa.field("features", pa.binary()), pa.field("num_tokens", pa.int32())]
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
}


def partition_name(k: int) -> str:
    return f"part-{k:05d}.parquet"


def _encode_parquet(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(
        rows, buffer, row_group_size=ROW_GROUP_ROWS, compression="none", use_dictionary=False,
        write_statistics=False,
    )  # fmt: skip
    return buffer.getvalue()


def count_statuses(rows: pa.Table) -> dict[str, int]:
    """Rows by status; a status's detail after the first ``:`` is left out of the count."""
    counts: dict[str, int] = {}
    for status in rows["status"].to_pylist():
        kind = status.partition(":")[0]
        counts[kind] = counts.get(kind, 0) + 1
    return counts


@dataclass(frozen=True)
class TableWriter:
    """Writes one table, partition by partition, from any process, and commits it once.

    ``folder`` must be this table's own: its name carries ``digest_of(settings, inputs)``, so other
    settings never meet old partitions.
    """

    folder: Path
    schema: str
    settings: dict[str, Any]
    inputs: dict[str, str]

    @classmethod
    def under(
        cls, root: Path, name: str, schema: str, settings: dict[str, Any], inputs: dict[str, str]
    ) -> "TableWriter":
        """The writer of ``root/name-<digest>``, where digest names the settings and inputs."""
        digest = digest_of({"schema": schema, "settings": settings, "inputs": inputs})
        return cls(root / f"{name}-{digest[:8]}", schema, settings, inputs)

    @property
    def is_committed(self) -> bool:
        return (self.folder / MANIFEST_FILE).is_file()

    def _record_path(self, k: int) -> Path:
        return self.folder / "_records" / f"{k:05d}.json"

    def is_written(self, k: int) -> bool:
        """Whether partition ``k`` is finished: its record, written last, is there."""
        return self._record_path(k).is_file() and (self.folder / partition_name(k)).is_file()

    def write(self, k: int, rows: pa.Table) -> None:
        """Write partition ``k`` whole: data first, record last."""
        exact = rows.select(SCHEMAS[self.schema].names).cast(SCHEMAS[self.schema])
        path = self.folder / partition_name(k)
        write_atomic(path, _encode_parquet(exact))
        record = FileRecord.of(path, count_statuses(exact))
        write_atomic(self._record_path(k), json.dumps(asdict(record)).encode())

    def commit(self, num_partitions: int, extra: dict[str, Any] | None = None) -> "Table":
        """Write the manifest over all partitions' records; the table now exists."""
        records = []
        for k in range(num_partitions):
            try:
                records.append(FileRecord(**json.loads(self._record_path(k).read_text())))
            except (OSError, ValueError, TypeError) as error:
                raise ManifestError(
                    f"{self._record_path(k)}: {error}; run the job again"
                ) from error
        manifest = Manifest(self.schema, self.settings, self.inputs, tuple(records), extra or {})
        manifest.commit_to(self.folder)
        return Table.open(self.folder)


@dataclass(frozen=True)
class Table:
    """A committed table."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path, schema: str | None = None) -> "Table":
        """Open a table. Raises ManifestError without a manifest, or with another schema's."""
        manifest = load_manifest(folder)
        if schema and manifest.schema != schema:
            raise ManifestError(f"{folder}: holds {manifest.schema}, but {schema} is needed")
        return cls(folder, manifest)

    @property
    def num_partitions(self) -> int:
        return len(self.manifest.files)

    @cached_property
    def digest(self) -> str:
        return self.manifest.digest

    def path(self, k: int) -> Path:
        return self.folder / self.manifest.files[k].name

    def read(self, k: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Partition ``k``, whole or some columns. Raises ManifestError if the file is gone."""
        try:
            return pq.read_table(self.path(k), columns=list(columns) if columns else None)
        except (OSError, pa.ArrowInvalid) as error:
            raise ManifestError(f"{self.path(k)}: cannot be read ({error}); restore it") from error

    def rejects(self) -> Iterable[dict[str, str]]:
        """Every rejected row's id, source (where the table has one) and reason."""
        names = [n for n in ("id", "source", "status") if n in SCHEMAS[self.manifest.schema].names]
        for k in range(self.num_partitions):
            for row in self.read(k, names).to_pylist():
                if row["status"] != OK:
                    yield row


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
                f"{other.folder} does not line up with {first.folder}: partitions or rows differ; "
                f"make both from the same image table"
            )
