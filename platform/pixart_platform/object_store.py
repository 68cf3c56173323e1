"""Folders on S3 and what speaks its protocol: the only file that knows boto3.

Credentials, region and endpoint come from where boto3 looks for them: ``AWS_ENDPOINT_URL`` in the
environment (of the workers too) points at another store. Requests are retried with back-off, 500
and 503 slow-down included; a body that breaks off is asked for again from where it broke. A commit
is a put with ``If-None-Match: *``, which S3 and its better imitations honour.
"""

import io
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import IO, Any

import boto3
import botocore.exceptions
import pyarrow as pa
import urllib3.exceptions
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from pixart_platform.errors import StorageError
from pixart_platform.storage import Entry, FileAbsent, FileRefused

_ATTEMPTS = 8
_CONNECTIONS = 64
_READ_SECONDS = 60
_PART_BYTES = 32 << 20  # parts of an upload; S3 allows 10,000, so files up to 320 GB
_BROKEN = (
    botocore.exceptions.HTTPClientError, botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.IncompleteReadError, urllib3.exceptions.HTTPError, OSError,
)  # fmt: skip
_MAKING = threading.Lock()


def _client() -> Any:
    """One client a process; threads may share boto3's clients, but not their making."""
    with _MAKING:
        return _make_client()


@cache
def _make_client() -> Any:
    config = Config(
        retries={"mode": "standard", "max_attempts": _ATTEMPTS},
        max_pool_connections=_CONNECTIONS, connect_timeout=10, read_timeout=_READ_SECONDS,
    )  # fmt: skip
    try:
        return boto3.Session().client("s3", config=config)
    except ValueError as error:
        raise StorageError(f"AWS_ENDPOINT_URL: {error}; write it as http://host:9000") from error


@dataclass(frozen=True)
class S3Folder:
    """``s3://bucket/prefix`` as a folder; see ``storage.Folder``."""

    bucket: str
    prefix: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def name(self) -> str:
        return self.prefix.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> "S3Folder":
        return S3Folder(self.bucket, self.prefix.rpartition("/")[0])

    @property
    def endpoint(self) -> str:
        """The server's address, as boto3 found it."""
        found: str = _client().meta.endpoint_url
        return found

    def __truediv__(self, name: str) -> "S3Folder":
        return S3Folder(self.bucket, self._key(name))

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def children(self) -> list[str]:
        start = len(self._key(""))
        return sorted(  # S3 sorts them with their slash
            found["Prefix"][start:].rstrip("/")
            for page in self._pages("", Delimiter="/")
            for found in page.get("CommonPrefixes", [])
        )

    def walk(self, prefix: str = "") -> Iterator[Entry]:
        start = len(self._key(""))
        for page in self._pages(prefix):
            for found in page.get("Contents", []):
                if not found["Key"].endswith("/"):  # what consoles put for an empty folder
                    yield Entry(found["Key"][start:], found["Size"], found["ETag"].strip('"'))

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        with self._explained(prefix):
            pages = _client().get_paginator("list_objects_v2")
            yield from pages.paginate(Bucket=self.bucket, Prefix=self._key(prefix), **options)

    def find(self, name: str) -> Entry | None:
        try:
            with self._explained(name):
                found = _client().head_object(Bucket=self.bucket, Key=self._key(name))
        except FileAbsent:
            return None
        return Entry(name, found["ContentLength"], found["ETag"].strip('"'))

    def read(self, name: str) -> bytes:
        return self._fetch(name, 0, None)

    def open(self, name: str) -> IO[bytes]:
        entry = self.find(name)
        if entry is None:
            raise FileAbsent(f"{self.uri}/{name}: no such file")
        return io.BufferedReader(_RangeFile(self, entry), buffer_size=1 << 16)

    def _fetch(self, name: str, start: int, length: int | None) -> bytes:
        """Bytes of a file from ``start``; a body that breaks off is continued, not repeated."""
        got = bytearray()
        for attempt in range(_ATTEMPTS):
            first = start + len(got)
            span = {} if first == 0 and length is None else {
                "Range": f"bytes={first}-" + ("" if length is None else str(start + length - 1))
            }  # fmt: skip
            with self._explained(name):
                answer = _client().get_object(Bucket=self.bucket, Key=self._key(name), **span)
            expected = len(got) + answer["ContentLength"]
            try:
                for chunk in answer["Body"].iter_chunks(1 << 20):
                    got += chunk
            except botocore.exceptions.FlexibleChecksumError:
                got.clear()  # no telling which of the bytes are wrong
            except _BROKEN:
                pass
            if len(got) == expected:
                return bytes(got)
            time.sleep(_delay(attempt))
        raise StorageError(f"{self.uri}/{name}: arrived broken {_ATTEMPTS} times; try again")

    def write(self, name: str, data: bytes | memoryview) -> None:
        parts = TransferConfig(multipart_threshold=2 * _PART_BYTES, multipart_chunksize=_PART_BYTES)
        with self._explained(name):
            _client().upload_fileobj(
                pa.BufferReader(data), self.bucket, self._key(name), Config=parts
            )

    def create_once(self, name: str, data: bytes) -> bool:
        for attempt in range(_ATTEMPTS):
            try:
                with self._explained(name):
                    _client().put_object(
                        Bucket=self.bucket, Key=self._key(name), Body=data, IfNoneMatch="*"
                    )
                return True
            except FileExistsError:
                # The answer to our own put may have been lost, and the retry found our bytes.
                return self.read(name) == data
            except _Conflict:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(_delay(attempt))
        raise AssertionError

    def delete(self, name: str) -> None:
        with self._explained(name):
            _client().delete_object(Bucket=self.bucket, Key=self._key(name))

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """boto3's errors in our words, with the object's URI."""
        place = f"{self.uri}/{name}"
        try:
            yield
        except botocore.exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            message = error.response.get("Error", {}).get("Message", "")
            if code in ("404", "NoSuchKey"):
                raise FileAbsent(f"{place}: no such file") from error
            if code == "NoSuchBucket":
                raise StorageError(f"{place}: there is no bucket {self.bucket!r}") from error
            if code in ("412", "PreconditionFailed"):
                raise FileExistsError(place) from error
            if code in ("409", "ConditionalRequestConflict"):
                raise _Conflict(f"{place}: other writers held it {_ATTEMPTS} times") from error
            told = f"{place}: S3 answered {code} {message}".rstrip()
            if code in ("403", "AccessDenied"):  # a look alone is refused by number
                raise FileRefused(
                    f"{told}; needed are s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket"
                ) from error
            raise StorageError(told) from error
        except botocore.exceptions.NoCredentialsError as error:
            raise StorageError(
                f"{place}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a "
                f"profile or role"
            ) from error
        except (botocore.exceptions.BotoCoreError, boto3.exceptions.Boto3Error) as error:
            raise StorageError(f"{place}: {error}") from error


class _Conflict(StorageError):
    """Another conditional put of the same key was under way; S3 asks to try again."""


class _RangeFile(io.RawIOBase):
    """An object as a file: every read is a request for its range."""

    def __init__(self, folder: S3Folder, entry: Entry) -> None:
        self._folder, self._entry, self._place = folder, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._entry.num_bytes}
        self._place = start[whence] + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._entry.num_bytes - self._place)
        if length <= 0:
            return 0
        data = self._folder._fetch(self._entry.name, self._place, length)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _delay(attempt: int) -> float:
    """Seconds before another attempt: exponential, capped, with full jitter."""
    return random.uniform(0, min(20.0, 0.1 * 2**attempt))
