"""The archive: Parquet files of old messages, in a directory or in S3, each with a manifest.

A file ``messages_2025_01.parquet`` holds rows of one month, sorted by topic, time of receipt and
id. Its manifest ``messages_2025_01.json`` is written after it, at once or not at all: a Parquet
file without a manifest is what an interrupted run has left, and does not count. Rows that arrive
for a month that is archived already go to another file, ``messages_2025_01-2.parquet``.
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
except ImportError:  # pragma: no cover - said by Archive
    pyarrow = None

FORMAT = 1
SORTED_BY = ("topic", "received_at", "id")
_GROUP_ROWS = 250_000  # in a row group of Parquet, which is held in memory while it is written
_GROUP_BYTES = 48 << 20
_CHUNK_ROWS = 1_000  # in memory as Python's objects
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Values of a row in the order of its columns: int, str, bytes, bool or None. A timestamp is
# an int, microseconds of Unix time: it is what PostgreSQL and Parquet store.
Row = tuple[Any, ...]


class ArchiveError(Exception):
    """The archive cannot be written, or what it has cannot be trusted."""


class Manifest(pydantic.BaseModel):
    """What a Parquet file of the archive holds."""

    format: int = FORMAT
    partition: str  # messages_2025_01
    file: str
    bytes: int
    sha256: str
    rows: int
    received_from: datetime  # of the oldest row
    received_to: datetime  # of the newest row
    columns: dict[str, str]  # with PostgreSQL's types
    written_at: datetime
    written_by: str = f"iot-collector {__version__}"

    @property
    def name(self) -> str:
        """The name of the manifest's own file."""
        return Path(self.file).with_suffix(".json").name


class Archive:
    """A directory, or a prefix of an S3 bucket.

    :param target: path of an existing directory, or ``s3://bucket/prefix``. Credentials and region
        come from where every AWS program has them (AWS_REGION, profile, role of the pod, ...).
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
            # Not created: what is missing is perhaps a volume that is not mounted.
            self.directory = Path(target)
            if not self.directory.is_dir():
                raise SettingsError(f"IOT_ARCHIVE_TARGET: {target} is no directory; create it")
            self._files, self._base = pyarrow.fs.LocalFileSystem(), str(self.directory.absolute())

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Write a file that appears, complete and on disk, only if the block succeeds.

        S3 shows a file when its upload ends, so after an error it is deleted again.
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
        """Write a small file and delete it, so that the fault is found before the work.

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
        """Write rows to another file of a partition, and then its manifest.

        :param columns: their names and PostgreSQL's types.
        :param rows: at least one, in the order of `SORTED_BY`.
        :raises ArchiveError: the file could not be written; then it does not count.
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
        """Read the whole file.

        :raises ArchiveError: it is not the file that its manifest describes.
        """
        expected, digest, size = self.manifest, hashlib.sha256(), 0
        with _explained(expected.file), self._open() as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
        if size != expected.bytes:
            raise ArchiveError(
                f"{expected.file} has {size} bytes, its manifest says {expected.bytes}: it is"
                " truncated or altered"
            )
        if digest.hexdigest() != expected.sha256:
            raise ArchiveError(f"{expected.file} is altered: its SHA-256 is not its manifest's")
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
    """Return the function that sorts rows as the archive does: by `SORTED_BY`.

    Python compares text by code points, which is the order of its UTF-8 bytes, as COLLATE "C".
    """
    return operator.itemgetter(*(list(columns).index(name) for name in SORTED_BY))


def lacking(
    rows: Iterable[Row], other: Iterable[Row], columns: Sequence[str], *, by_key: bool = False
) -> Iterator[Row]:
    """Yield the rows that the others lack; both are in the order of `SORTED_BY`.

    :param by_key: a row with the same topic, time and id is the same row; otherwise every column
        has to be equal.
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


# PostgreSQL's type -> Arrow's; any other is archived as its text. So are floats: NaN is not equal
# to itself, and could not be compared.
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
    """Return the SQL that selects a column as a value of `Row`."""
    quoted = '"' + column.replace('"', '""') + '"'
    if kind == TIMESTAMP:
        return f"(extract(epoch FROM {quoted}) * 1000000)::bigint"
    return quoted if kind in _ARROW_TYPES else f"{quoted}::text"


def _write_parquet(
    output: "_HashingFile", columns: dict[str, str], rows: Iterable[Row]
) -> tuple[int, int, int]:
    """Write rows as Parquet; return their number, and the oldest and newest ``received_at``."""
    schema = pyarrow.schema([(name, _arrow_type(kind)) for name, kind in columns.items()])
    # Ids and times grow from row to row: their differences take a tenth (benchmarks/archive.py).
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
    """A file to write to, which keeps the SHA-256 of what was written.

    It has what pyarrow asks of a file object.
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
        """Do nothing: whoever opened the file closes it."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn an error of a file system into one that says what to do."""
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
