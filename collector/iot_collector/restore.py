"""Restore: bring an archived month back into the table ``messages``, each row once."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2
import psycopg2.extensions

from .archive_files import TIMESTAMP, Archive, Part, Row, lacking, merged
from .copy_format import copy_pieces
from .database import connect
from .partitions import KEPT_UNTIL
from .retention import (
    NO_ARCHIVE,
    Progress,
    RetentionError,
    columns_of,
    is_partition,
    left_over,
    no_progress,
    only_one,
    prepare,
    rows_of,
    transaction,
)
from .settings import Settings

Cursor = psycopg2.extensions.cursor

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def restore(
    settings: Settings, month: str, keep_days: int, progress: Progress = no_progress
) -> str:
    """Bring a month back, and keep it from being archived again for some days.

    Rows keep their ids. Rows that are already in the table are not stored again, so the command can
    be repeated.

    :param month: ``2025-01``.
    :returns: what was done.
    :raises ArchiveError: the archive is truncated or altered, or cannot be read.
    :raises RetentionError: the month cannot be restored.
    :raises psycopg2.Error: a statement failed. After any error, no row was restored.
    """
    if settings.archive_target in (None, NO_ARCHIVE):
        raise RetentionError("IOT_ARCHIVE_TARGET is not set to an archive: set it, or use --target")
    table = f"messages_{month.replace('-', '_')}"
    archive = Archive(str(settings.archive_target))
    parts = [part.verify() for part in archive.parts(table)]
    if not parts:
        raise RetentionError(f"there is no archive of {month}: no {table}.json in {archive.target}")
    with only_one(settings) as cursor:
        if cursor is None:
            raise RetentionError("another archive or restore is running; try again later")
        if left_over(cursor, table):
            raise RetentionError(
                f"{table} is half archived: run iot-collector archive first, then restore again"
            )
        columns = _columns(cursor, parts)
        cursor.execute("SELECT ensure_partitions(%s, 0)", (f"{month}-01 00:00+00",))
        if not is_partition(cursor, table):
            raise RetentionError(
                f"a table {table} exists, but is not a partition of messages: rename it"
            )
        # Set before the rows are stored, so that they are not archived again at once.
        until = datetime.now(UTC).date() + timedelta(days=keep_days)
        cursor.execute(f"COMMENT ON TABLE {table} IS '{KEPT_UNTIL}{until}'")
        with transaction(cursor):
            # Inserts into this month wait until COMMIT.
            cursor.execute(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")
            count = _load(settings, cursor, table, columns, parts, progress)
        _advance_ids(cursor, table)
    total = sum(part.manifest.rows for part in parts)
    return f"{table}: {count} of {total} rows restored, kept until {until}"


def _columns(cursor: Cursor, parts: list[Part]) -> dict[str, str]:
    """Return the columns of the archive: name -> PostgreSQL type.

    :raises RetentionError: a column is missing in the table, or has another type there.
    """
    archived = {name: kind for part in parts for name, kind in part.manifest.columns.items()}
    present = columns_of(cursor, "messages")
    for name, kind in archived.items():
        if present.get(name) != kind:
            raise RetentionError(
                f"the archive has a column {name} of type {kind}, but in the table messages it"
                f" {'has type ' + present[name] if name in present else 'is missing'}:"
                " this archive does not fit this schema"
            )
    return archived


def _load(
    settings: Settings,
    cursor: Cursor,
    table: str,
    columns: dict[str, str],
    parts: list[Part],
    progress: Progress,
) -> int:
    """Copy the rows that the table lacks; return how many there were."""
    total = sum(part.manifest.rows for part in parts)
    count = 0

    def new_rows(present: Iterable[Row]) -> Iterator[Row]:
        nonlocal count
        archived = progress(merged(parts, list(columns)), f"restoring {table}", total)
        for row in lacking(archived, present, list(columns), by_key=True):
            count += 1
            yield row

    # COPY occupies one connection, so existing rows are read on another.
    with closing(connect(settings)) as other, other.cursor() as reader:
        prepare(reader, settings)
        with transaction(reader, "READ ONLY"):
            reader.execute(f"SELECT EXISTS (SELECT FROM {table})")  # noqa: S608
            [(had_rows,)] = reader.fetchall()
            names = ", ".join(f'"{name}"' for name in columns)
            lines = _lines(new_rows(rows_of(reader, table, columns)), columns)
            copy_pieces(cursor, f"COPY {table} ({names}) FROM STDIN".encode(), lines)
    archived = progress(merged(parts, list(columns)), f"comparing {table}", total)
    present = rows_of(cursor, table, columns)
    # Somebody may have changed a row that was in the table before. It is left as it is.
    for _ in lacking(archived, present, list(columns), by_key=had_rows):
        raise RetentionError(f"{table}: the restored rows differ from those of the archive")
    return count


def _lines(rows: Iterable[Row], columns: dict[str, str]) -> Iterator[bytes]:
    """Encode rows in the text format of COPY (https://www.postgresql.org/docs/current/sql-copy.html)."""
    encoders = [_encoder(kind) for kind in columns.values()]
    for row in rows:
        values = [
            "\\N" if value is None else encode(value)
            for value, encode in zip(row, encoders, strict=True)
        ]
        yield ("\t".join(values) + "\n").encode()


_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def _encoder(kind: str) -> Callable[[Any], str]:
    """Return the function that encodes the values of a type."""
    if kind == "bytea":
        return lambda value: "\\\\x" + value.hex()
    if kind == TIMESTAMP:
        return lambda value: (_EPOCH + timedelta(microseconds=value)).isoformat()
    return lambda value: str(value).translate(_ESCAPES)


def _advance_ids(cursor: Cursor, table: str) -> None:
    """Make new rows get ids above the restored ones, which may come from another database."""
    cursor.execute(
        "SELECT setval(s, top) FROM pg_get_serial_sequence('messages', 'id') s,"  # noqa: S608
        f" (SELECT max(id) AS top FROM {table}) t"
        " WHERE top > coalesce(pg_sequence_last_value(s::regclass), 0)"
    )
