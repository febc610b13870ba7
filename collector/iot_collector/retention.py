"""Retention: months older than IOT_ARCHIVE_KEEP_MONTHS are archived, and then dropped.

For each partition, in this order:

1. Write its rows to the archive, and read the file back (`archive_files.Archive.write`). Until here
   nothing has changed in the database.
2. Detach the partition. DETACH CONCURRENTLY blocks no INSERT. From now on no row can be inserted
   into it through ``messages``, and queries do not see its rows any more.
3. Lock the detached table, and compare the archive with the table row by row. If a row is missing
   in the archive (it arrived between 1 and 2), write it to another file, and repeat 3.
4. Drop the table, in the transaction of the comparison.

Rows are archived before the partition is detached, so that they can be queried until they are in
the archive. They are compared afterwards, so that a row that arrives late is not lost. A run that
is interrupted leaves either an attached partition, or a detached table with a comment that says
that it is being archived. The next run continues with both.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import NoReturn

import psycopg2
import psycopg2.extensions
import structlog

from .archive_files import SORTED_BY, Archive, ArchiveError, Row, lacking, merged, sql_expression
from .database import connect, explain
from .partitions import kept_until
from .reindex import rebuild_indexes
from .settings import Settings, SettingsError

log = structlog.get_logger(__name__)

Cursor = psycopg2.extensions.cursor
Progress = Callable[[Iterable[Row], str, int], Iterable[Row]]

NO_ARCHIVE = "none"  # value of IOT_ARCHIVE_TARGET: drop months without archiving them
NAME = re.compile(r"messages_(\d{4})_(\d\d)")  # of a partition, see ensure_partitions
_ARCHIVING = "iot-collector: being archived"
_DETACHED = "_detached"  # suffix of a detached table, so that its month can have a new partition
_CLOCKS_DIFFER = 86_400  # seconds
_FETCH_ROWS = 500


class RetentionError(Exception):
    """A month cannot be archived or restored."""


@dataclass
class Partition:
    """The table of a month that is due to be archived. An interrupted run may have detached it."""

    oid: int
    table: str  # quoted, with its schema
    name: str  # messages_2025_01
    attached: bool
    pending: bool  # DETACH CONCURRENTLY was interrupted
    bytes: int  # with indexes


@contextmanager
def only_one(settings: Settings) -> Iterator[Cursor | None]:
    """Yield a cursor, or None while another process archives or restores.

    :raises psycopg2.Error: the database cannot be reached.
    """
    with closing(connect(settings)) as connection, connection.cursor() as cursor:
        prepare(cursor, settings)
        cursor.execute("SELECT pg_try_advisory_lock(hashtext('iot.archive'))")
        [(locked,)] = cursor.fetchall()
        yield cursor if locked else None


def prepare(cursor: Cursor, settings: Settings) -> None:
    """Set up a session without a limit for statements, but with a limit for waiting for locks."""
    cursor.execute(
        "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0;"
        "SET timezone = 'UTC'; SET bytea_output = 'hex'; SET extra_float_digits = 1;"
        "SELECT set_config('lock_timeout', %s, false)",
        (str(round(settings.database_timeout_seconds * 1000)),),
    )
    psycopg2.extensions.register_type(_BYTES, cursor)


def _bytes(value: str | bytes | None, _cursor: object) -> bytes | None:
    return None if value is None else bytes.fromhex(str(value)[2:])


_BYTES = psycopg2.extensions.new_type((17,), "bytes", _bytes)  # 17: the OID of bytea


@contextmanager
def transaction(cursor: Cursor, mode: str = "") -> Iterator[None]:
    """COMMIT at the end of the block, ROLLBACK on any error."""
    cursor.execute(f"BEGIN {mode}")
    try:
        yield
    except BaseException:
        if not cursor.connection.closed:
            cursor.execute("ROLLBACK")
        raise
    cursor.execute("COMMIT")


def columns_of(cursor: Cursor, table: str) -> dict[str, str]:
    """Return the columns of a table: name -> PostgreSQL type."""
    cursor.execute(
        "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute"
        " WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        (table,),
    )
    return dict(cursor.fetchall())


def rows_of(cursor: Cursor, table: str, columns: dict[str, str]) -> Iterator[Row]:
    """Yield the rows of a table in the order of the archive, within the current transaction."""
    values = ", ".join(sql_expression(name, kind) for name, kind in columns.items())
    order = ", ".join(
        f'{name} COLLATE "C"' if columns[name] == "text" else name for name in SORTED_BY
    )
    cursor.execute(
        f"DECLARE archive NO SCROLL CURSOR FOR SELECT {values} FROM {table} ORDER BY {order}"  # noqa: S608
    )
    while True:
        cursor.execute(f"FETCH {_FETCH_ROWS} FROM archive")
        rows = cursor.fetchall()
        yield from rows
        if len(rows) < _FETCH_ROWS:
            break
    cursor.execute("CLOSE archive")


def no_progress(rows: Iterable[Row], _what: str, _total: int) -> Iterable[Row]:
    """Show nothing."""
    return rows


def archive(
    settings: Settings, *, dry_run: bool = False, progress: Progress = no_progress
) -> Iterator[tuple[bool, str]]:
    """Archive and drop the months that are due, and rebuild the indexes of past months.

    :returns: for each month, whether it succeeded, and a text that says what was done.
    :raises SettingsError: IOT_ARCHIVE_TARGET is wrong.
    :raises ArchiveError: the archive cannot be used. Only archived rows were dropped.
    :raises RetentionError: IOT_ARCHIVE_TARGET is not set, the clocks of the database and of this
        machine differ, or what is read back from the archive differs from the table.
    :raises psycopg2.Error: a statement failed; the next run continues.
    """
    target = settings.archive_target
    if not target:
        raise RetentionError(
            "IOT_ARCHIVE_TARGET is not set: set a directory, s3://bucket/prefix, or none to drop"
            " old months without an archive"
        )
    store = None if target == NO_ARCHIVE else Archive(target)
    with only_one(settings) as cursor:
        if cursor is None:
            yield True, "another archive or restore is running; nothing to do"
            return
        _check_clocks(cursor)
        due = list(_due(cursor, settings.archive_keep_months))
        if not due:
            yield True, f"no month is older than {settings.archive_keep_months} months"
        elif store and not dry_run:
            store.check_writable()
        for partition in due:
            blockers = _blockers(cursor, partition)
            if blockers:
                yield (
                    False,
                    f"{partition.name}: not archived and not dropped, because"
                    f" {', '.join(blockers)} depends on it; drop or change that first",
                )
            elif dry_run:
                yield True, _plan(cursor, partition, target)
            else:
                yield True, _archive(cursor, partition, store, progress)
        yield from rebuild_indexes(cursor, dry_run=dry_run)


def archive_for_ever(settings: Settings, hours: float) -> NoReturn:
    """Archive every ``hours`` hours; after a failure, again within an hour."""
    while True:
        failed = False
        try:
            for done, text in archive(settings):
                failed |= not done
                (log.info if done else log.error)(text)
        except psycopg2.Error as error:
            failed = True
            log.error("archive failed: database error", error=explain(error))  # noqa: TRY400
        except (ArchiveError, RetentionError, SettingsError) as error:
            failed = True
            log.error("archive failed", error=str(error))  # noqa: TRY400
        time.sleep(3600 * (min(hours, 1) if failed else hours))


def _check_clocks(cursor: Cursor) -> None:
    cursor.execute("SELECT extract(epoch FROM now())::float8")
    [(there,)] = cursor.fetchall()
    if abs(there - time.time()) > _CLOCKS_DIFFER:
        raise RetentionError(
            f"the clock of this machine says {_day(time.time())}, but that of the database"
            f" {_day(there)}: nothing was archived; correct the wrong clock"
        )


def _day(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M UTC")


_FIND = """
SELECT c.oid, format('%I.%I', n.nspname, c.relname), c.relname, i.inhrelid IS NOT NULL,
       coalesce(i.inhdetachpending, false), pg_total_relation_size(c.oid),
       coalesce(obj_description(c.oid, 'pg_class'), '')
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_inherits i ON i.inhrelid = c.oid AND i.inhparent = 'messages'::regclass
WHERE c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'messages'::regclass)
  AND c.relname ~ '^messages_[0-9]{4}_[0-9]{2}' AND c.relkind IN ('r', 'p', 'f')
ORDER BY i.inhrelid IS NOT NULL, c.relname  -- tables that an interrupted run has left come first
"""


def _due(cursor: Cursor, keep_months: int) -> Iterator[Partition]:
    """Yield the partitions that are due, and the tables that an interrupted run has left."""
    cursor.execute(
        "SELECT (date_trunc('month', now()) - make_interval(months => %s))::date", (keep_months,)
    )
    [(cutoff,)] = cursor.fetchall()
    cursor.execute(_FIND)
    for oid, table, relname, attached, pending, size, comment in cursor.fetchall():
        name = relname.removesuffix(_DETACHED)
        match = NAME.fullmatch(name)
        if match is None or not (attached or comment == _ARCHIVING):
            continue  # somebody else's table
        kept = kept_until(comment)
        month = date(int(match[1]), int(match[2]), 1)
        wanted = month >= cutoff or (kept is not None and kept > _today())
        if wanted and attached and not pending:
            continue
        yield Partition(oid, table, name, attached, pending, size)


def is_partition(cursor: Cursor, table: str) -> bool:
    """Whether a table is attached to ``messages``."""
    cursor.execute(
        "SELECT 1 FROM pg_inherits WHERE inhparent = 'messages'::regclass"
        " AND inhrelid = to_regclass(%s) AND NOT inhdetachpending",
        (table,),
    )
    return cursor.fetchone() is not None


def left_over(cursor: Cursor, name: str) -> bool:
    """Whether an interrupted run has left a month detached, or half detached."""
    cursor.execute(_FIND)
    return any(
        relname.removesuffix(_DETACHED) == name
        and (pending or (not attached and comment == _ARCHIVING))
        for _, _, relname, attached, pending, _, comment in cursor.fetchall()
    )


def _today() -> date:
    return datetime.now(UTC).date()


def _blockers(cursor: Cursor, partition: Partition) -> list[str]:
    """Return the objects that prevent DROP TABLE, or that it would drop although not ours."""
    cursor.execute(
        "SELECT DISTINCT CASE WHEN d.classid = 'pg_rewrite'::regclass"
        "   THEN (SELECT CASE relkind WHEN 'm' THEN 'materialized view ' ELSE 'view ' END"
        "         || ev_class::regclass FROM pg_rewrite r JOIN pg_class v ON v.oid = ev_class"
        "         WHERE r.oid = d.objid)"
        "   ELSE pg_describe_object(d.classid, d.objid, d.objsubid) END"
        " FROM pg_depend d WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = %s"
        "   AND d.deptype = 'n'"
        # CHECK constraints of the table itself are dropped with it. DETACH CONCURRENTLY adds one.
        "   AND NOT EXISTS (SELECT FROM pg_constraint k WHERE d.classid = 'pg_constraint'::regclass"
        "     AND k.oid = d.objid AND k.conrelid = d.refobjid) "
        "UNION SELECT 'table ' || inhrelid::regclass FROM pg_inherits WHERE inhparent = %s "
        "UNION SELECT 'foreign table ' || oid::regclass FROM pg_class WHERE oid = %s"
        "   AND relkind = 'f' "
        "UNION SELECT 'the default partition ' || partdefid::regclass"
        " FROM pg_partitioned_table WHERE partrelid = 'messages'::regclass AND partdefid <> 0 "
        "ORDER BY 1",
        (partition.oid, partition.oid, partition.oid),
    )
    return [name for (name,) in cursor.fetchall()]


def _plan(cursor: Cursor, partition: Partition, target: str) -> str:
    count = _count(cursor, partition.table)
    to = "" if target == NO_ARCHIVE else f"archived to {target}, then "
    return f"{partition.name}: {count} rows, {partition.bytes} bytes: would be {to}dropped"


def _count(cursor: Cursor, table: str) -> int:
    cursor.execute(f"SELECT count(*) FROM {table}")  # noqa: S608
    [(count,)] = cursor.fetchall()
    return int(count)


def _archive(
    cursor: Cursor, partition: Partition, store: Archive | None, progress: Progress
) -> str:
    """Archive a month and drop it; return what was done."""
    if store and partition.attached and not partition.pending:
        with transaction(cursor, "ISOLATION LEVEL REPEATABLE READ READ ONLY"):
            _export(cursor, partition, store, progress, "writing")
    if partition.attached:
        _detach(cursor, partition)
    for _ in range(2):
        with transaction(cursor):
            cursor.execute(f"LOCK TABLE {partition.table} IN ACCESS EXCLUSIVE MODE")
            count = _count(cursor, partition.table)
            written = store and _export(cursor, partition, store, progress, "comparing")
            if not written:
                cursor.execute(f"DROP TABLE {partition.table}")
                done = "dropped" if store is None else "archived, read back and dropped"
                return f"{partition.name}: {count} rows {done}"
    raise RetentionError(
        f"{partition.name}: the rows that were read back from the archive differ from those that"
        f" were written; the table is kept as {partition.table}"
    )


def _export(
    cursor: Cursor, partition: Partition, store: Archive, progress: Progress, what: str
) -> bool:
    """Write the rows that are missing in the archive; return whether there were any.

    :raises ArchiveError: the archive cannot be read or written, or a file in it is damaged.
    """
    columns = columns_of(cursor, partition.table)
    parts = [part.verify() for part in store.parts(partition.name)]
    total = _count(cursor, partition.table)
    rows = progress(rows_of(cursor, partition.table, columns), f"{what} {partition.name}", total)
    new = lacking(rows, merged(parts, list(columns)), list(columns))
    first = next(new, None)
    if first is None:
        return False

    def all_new() -> Iterator[Row]:
        yield first
        yield from new

    store.write(partition.name, columns, all_new())
    return True


def _detach(cursor: Cursor, partition: Partition) -> None:
    """Detach a partition and rename its table, so that a new partition can take a late row.

    :raises psycopg2.Error: for example, a query used the partition for too long. The next run
        continues.
    """
    if partition.pending:
        cursor.execute(f"ALTER TABLE messages DETACH PARTITION {partition.table} FINALIZE")
    else:
        cursor.execute(f"COMMENT ON TABLE {partition.table} IS '{_ARCHIVING}'")
        cursor.execute(f"ALTER TABLE messages DETACH PARTITION {partition.table} CONCURRENTLY")
    schema = partition.table.rpartition(".")[0]
    cursor.execute(f'ALTER TABLE {partition.table} RENAME TO "{partition.name}{_DETACHED}"')
    partition.table, partition.attached = f'{schema}."{partition.name}{_DETACHED}"', False
