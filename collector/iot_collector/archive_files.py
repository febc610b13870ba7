"""The archive: Parquet files of old messages, in a directory or in S3, each with a manifest.

A file ``messages_2025_01.parquet`` holds rows of one month, sorted by topic, time of receipt and
id. Its manifest ``messages_2025_01.json`` is written after it, atomically. A Parquet file without a
manifest was left by an interrupted run, and is ignored. Rows that arrive for a month that is
already archived go to another file, ``messages_2025_01-2.parquet``.
"""

import hashlib
import heapq
import itertools
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, Self

import pydantic

from . import __version__
from .settings import SettingsError

try:
    import pyarrow
    import pyarrow.fs
    import pyarrow.parquet
except ImportError:  # pragma: no cover - Archive reports it
    pyarrow = None

FORMAT = 1
SORTED_BY = ("topic", "received_at", "id")
_GROUP_ROWS = 250_000  # of a Parquet row group, which is kept in memory until it is written
_GROUP_BYTES = 48 << 20
_CHUNK_ROWS = 1_000  # kept in memory as Python objects
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Values of a row in the order of its columns: int, str, bytes, bool or None. A timestamp is
# an int, Unix time in microseconds, because PostgreSQL and Parquet store microseconds.
Row = tuple[Any, ...]


class ArchiveError(Exception):
    """The archive cannot be read or written, or a file in it is damaged."""


class Manifest(pydantic.BaseModel):
    """The description of one Parquet file of the archive."""

    format: int = FORMAT
    partition: str  # messages_2025_01
    file: str
    bytes: int
    sha256: str
    rows: int
    received_from: datetime  # of the oldest row
    received_to: datetime  # of the newest row
    columns: dict[str, str]  # name -> PostgreSQL type
    written_at: datetime
    written_by: str = f"iot-collector {__version__}"

    @property
    def name(self) -> str:
        """The name of the manifest's own file."""
        return Path(self.file).with_suffix(".json").name


class Archive:
    """A directory, or a prefix of an S3 bucket.

    :param target: path of an existing directory, or ``s3://bucket/prefix``. Credentials and region
        come from the usual sources of AWS programs (AWS_REGION, profile, role of the pod, ...).
    :raises SettingsError: pyarrow is not installed, or there is no such directory.
    :raises ArchiveError: S3 cannot be used.
    """

    def __init__(self, target: str) -> None:
        if pyarrow is None:
            raise SettingsError(
                "IOT_ARCHIVE_TARGET: pyarrow is not installed; pip install 'iot-collector[archive]'"
            )
        self.target = target
        self.directory: Path | None = None
        if target.startswith("s3://"):
            with _explained(target):
                self._files, self._base = pyarrow.fs.FileSystem.from_uri(target)
        else:
            # Not created, because a missing directory may be a volume that is not mounted.
            self.directory = Path(target)
            if not self.directory.is_dir():
                raise SettingsError(f"IOT_ARCHIVE_TARGET: {target} is not a directory; create it")
            self._files, self._base = pyarrow.fs.LocalFileSystem(), str(self.directory.absolute())

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Write a file that appears only if the block succeeds, complete and synced to disk.

        In S3 an object appears when its upload ends, so it is deleted after an error.
        """
        if self.directory is None:
            with _explained(self._path(name)):
                try:
                    with self._files.open_output_stream(self._path(name)) as stream:
                        yield stream
                except BaseException:
                    with suppress(OSError):
                        self._files.delete_file(self._path(name))
                    raise
            return
        hidden = self.directory / f".{name}.tmp"
        with _explained(str(self.directory / name)):
            try:
                with hidden.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                hidden.replace(self.directory / name)
                _sync(self.directory)
            except BaseException:
                with suppress(OSError):
                    hidden.unlink()
                raise

    def check_writable(self) -> None:
        """Write a small file and delete it, to find an error before the work starts.

        :raises ArchiveError: it could not be written.
        """
        with self.create("iot-collector-write-test") as file:
            file.write(b"x")
        with _explained(self.target):
            self._files.delete_file(self._path("iot-collector-write-test"))

    def parts(self, partition: str) -> list["Part"]:
        """Return the files of a partition that have a manifest, the oldest first.

        :raises ArchiveError: a manifest cannot be read.
        """
        name = re.compile(rf"{re.escape(partition)}(?:-(\d+))?\.json")
        with _explained(self.target):
            listing = self._files.get_file_info(
                pyarrow.fs.FileSelector(self._base, allow_not_found=True)
            )
        found = sorted(
            (int(match[1] or 1), file.path)
            for file in listing
            if (match := name.fullmatch(file.base_name))
        )
        return [self._part(path) for _, path in found]

    def _part(self, path: str) -> "Part":
        with _explained(path):
            with self._files.open_input_stream(path) as stream:
                text = stream.read()
            try:
                manifest = Manifest.model_validate_json(text)
            except pydantic.ValidationError as error:
                raise ArchiveError(f"{path} is not a manifest of the archive: {error}") from None
        if manifest.format != FORMAT:
            raise ArchiveError(f"{path}: format {manifest.format} is newer than this iot-collector")
        return Part(manifest, lambda: self._files.open_input_file(self._path(manifest.file)))

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def write(self, partition: str, columns: dict[str, str], rows: Iterable[Row]) -> Manifest:
        """Write rows to a new file of a partition, and then its manifest.

        :param columns: name -> PostgreSQL type.
        :param rows: at least one, in the order of `SORTED_BY`.
        :raises ArchiveError: the file could not be written. It has no manifest, so it is ignored.
        """
        number = len(self.parts(partition)) + 1
        stem = partition if number == 1 else f"{partition}-{number}"
        name = f"{stem}.parquet"
        with self.create(name) as file:
            output = _HashingFile(file)
            count, first, last = _write_parquet(output, columns, rows)
        manifest = Manifest(
            partition=partition,
            file=name,
            bytes=output.size,
            sha256=output.hash.hexdigest(),
            rows=count,
            received_from=_EPOCH + timedelta(microseconds=first),
            received_to=_EPOCH + timedelta(microseconds=last),
            columns=columns,
            written_at=datetime.now(UTC),
        )
        Part(manifest, lambda: self._files.open_input_file(self._path(name))).verify()
        with self.create(manifest.name) as file:
            document = manifest.model_dump(mode="json")
            file.write(json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")
        return manifest


class Part:
    """A Parquet file of the archive."""

    def __init__(self, manifest: Manifest, opener: Callable[[], Any]) -> None:
        self.manifest = manifest
        self._open = opener

    def verify(self) -> Self:
        """Read the whole file, and compare its size and SHA-256 with its manifest.

        :raises ArchiveError: they differ, or the file cannot be read.
        """
        expected, digest, size = self.manifest, hashlib.sha256(), 0
        with _explained(expected.file), self._open() as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
        if size != expected.bytes:
            raise ArchiveError(
                f"{expected.file} has {size} bytes, but its manifest says {expected.bytes}: it is"
                " truncated or altered"
            )
        if digest.hexdigest() != expected.sha256:
            raise ArchiveError(f"{expected.file} is altered: its SHA-256 differs from its manifest")
        return self

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Yield the rows; a column that the file does not have is None."""
        with _explained(self.manifest.file), self._open() as source:
            file = pyarrow.parquet.ParquetFile(source)
            for batch in file.iter_batches(_CHUNK_ROWS):
                yield from zip(*(_values(batch, name) for name in columns), strict=True)


def merged(parts: Iterable[Part], columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of several files, in the order of `SORTED_BY`."""
    return heapq.merge(*(part.rows(columns) for part in parts), key=sort_key(columns))


def sort_key(columns: Sequence[str]) -> Callable[[Row], Any]:
    """Return a key function that sorts rows in the order of the archive, `SORTED_BY`.

    Python compares text by code points. This is the order of the UTF-8 bytes, as in COLLATE "C".
    """
    return operator.itemgetter(*(list(columns).index(name) for name in SORTED_BY))


def lacking(
    rows: Iterable[Row], other: Iterable[Row], columns: Sequence[str], *, by_key: bool = False
) -> Iterator[Row]:
    """Yield the rows that are missing in ``other``; both are in the order of `SORTED_BY`.

    :param by_key: rows with the same topic, time and id count as equal; otherwise all columns have
        to be equal.
    """
    key = sort_key(columns)
    others = iter(other)
    candidate = next(others, None)
    candidate_key = candidate and key(candidate)
    current, same_key = None, list[Row]()
    for row in rows:
        wanted = key(row)
        if wanted != current:
            current, same_key = wanted, []
            while candidate is not None and candidate_key <= wanted:
                if candidate_key == wanted:
                    same_key.append(candidate)
                candidate = next(others, None)
                candidate_key = candidate and key(candidate)
        if row in same_key:
            same_key.remove(row)
        elif by_key and same_key:
            same_key.pop()
        else:
            yield row


# PostgreSQL type -> Arrow type. All other types are archived as text. So are floats, because NaN is
# not equal to itself and could not be compared.
_ARROW_TYPES = {
    "smallint": "int16",
    "integer": "int32",
    "bigint": "int64",
    "boolean": "bool_",
    "bytea": "binary",
}
TIMESTAMP = "timestamp with time zone"


def _arrow_type(kind: str) -> Any:
    if kind == TIMESTAMP:
        return pyarrow.timestamp("us", "UTC")
    return getattr(pyarrow, _ARROW_TYPES.get(kind, "string"))()


def sql_expression(column: str, kind: str) -> str:
    """Return the SQL expression that selects a column as a value of a `Row`."""
    quoted = '"' + column.replace('"', '""') + '"'
    if kind == TIMESTAMP:
        return f"(extract(epoch FROM {quoted}) * 1000000)::bigint"
    return quoted if kind in _ARROW_TYPES else f"{quoted}::text"


def _write_parquet(
    output: "_HashingFile", columns: dict[str, str], rows: Iterable[Row]
) -> tuple[int, int, int]:
    """Write rows as Parquet; return their number, and the oldest and newest ``received_at``."""
    schema = pyarrow.schema([(name, _arrow_type(kind)) for name, kind in columns.items()])
    # Ids and times grow from row to row, so their differences take a tenth of the space
    # (benchmarks/archive.py).
    growing = [name for name, kind in columns.items() if kind in ("bigint", TIMESTAMP)]
    received_at = list(columns).index("received_at")
    count, times = 0, list[int]()
    with pyarrow.parquet.ParquetWriter(
        output,
        schema,
        compression="zstd",
        compression_level=9,
        use_dictionary=[name for name in columns if name not in growing],
        column_encoding=dict.fromkeys(growing, "DELTA_BINARY_PACKED"),
    ) as writer:
        group = list[Any]()
        for chunk in _chunks(rows):
            values = list(zip(*chunk, strict=True))
            times += [min(values[received_at]), max(values[received_at])]
            count += len(chunk)
            group.append(_batch(values, schema))
            if (
                sum(batch.num_rows for batch in group) >= _GROUP_ROWS
                or sum(batch.nbytes for batch in group) >= _GROUP_BYTES
            ):
                writer.write_table(pyarrow.Table.from_batches(group))
                group = []
        if group:
            writer.write_table(pyarrow.Table.from_batches(group))
    return count, min(times), max(times)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, _CHUNK_ROWS)):
        yield chunk


def _batch(values: list[tuple[Any, ...]], schema: Any) -> Any:
    """Return columns of `Row` values as a record batch."""
    arrays = [
        pyarrow.array(column, pyarrow.int64()).cast(field.type)
        if pyarrow.types.is_timestamp(field.type)
        else pyarrow.array(column, field.type)
        for column, field in zip(values, schema, strict=True)
    ]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=schema)


def _values(batch: Any, name: str) -> list[Any]:
    """Return a column of a record batch as values of `Row`."""
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    column = batch.column(name)
    if pyarrow.types.is_timestamp(column.type):
        column = column.cast(pyarrow.int64())
    values: list[Any] = column.to_pylist()
    return values


class _HashingFile:
    """A writable file that computes the size and SHA-256 of its content.

    It has the methods that pyarrow needs of a file object.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: bytes) -> None:
        self.hash.update(data)
        self.size += len(data)
        self._file.write(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Do nothing: the file is flushed when it is complete."""

    def close(self) -> None:
        """Do nothing: `Archive.create` closes the file."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn an OSError into an ArchiveError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        hint = next((h for sign, h in _HINTS.items() if sign.lower() in reason.lower()), "")
        raise ArchiveError(f"archive {what}: {reason}{hint}") from error


_HINTS = {
    "no space left": "; make room, or set IOT_ARCHIVE_TARGET to another directory",
    "quota": "; make room, or set IOT_ARCHIVE_TARGET to another directory",
    "permission denied": "; let the user that runs iot-collector write there",
    "read-only": "; let the user that runs iot-collector write there",
    "access_denied": "; allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket",
    "access denied": "; allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket",
    "no_such_bucket": "; create the bucket, or correct IOT_ARCHIVE_TARGET",
    "permanentredirect": "; set AWS_REGION to the region of the bucket",
}


def _sync(directory: Path) -> None:
    """Make a renamed file survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
