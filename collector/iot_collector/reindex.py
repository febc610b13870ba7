"""Rebuild the index on topic and time of each past month.

Each topic inserts at a different place in that B-tree. So a full page is split in the middle, and
its first half never fills again: the index takes 85 bytes a row, and 50 after a rebuild
(benchmarks/LAYOUT.md). A past month hardly gets new rows, so one rebuild is enough. A comment on
the index records it.
"""

from collections.abc import Iterator

import psycopg2.errors
import psycopg2.extensions

_REBUILT = "iot-collector: rebuilt"
_WORTH_IT = 1 << 20  # bytes; a smaller index is not rebuilt

_FIND = """
SELECT format('%%I.%%I', n.nspname, i.relname), t.relname, pg_relation_size(i.oid)
FROM pg_inherits p
JOIN pg_class i ON i.oid = p.inhrelid
JOIN pg_namespace n ON n.oid = i.relnamespace
JOIN pg_index x ON x.indexrelid = i.oid
JOIN pg_class t ON t.oid = x.indrelid
WHERE p.inhparent = to_regclass('messages_topic')
  AND t.relname ~ '^messages_[0-9]{4}_[0-9]{2}$'
  AND t.relname < 'messages_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM')
  AND pg_relation_size(i.oid) > %s
  AND obj_description(i.oid, 'pg_class') IS DISTINCT FROM %s
ORDER BY t.relname
"""
# The invalid index that an interrupted REINDEX CONCURRENTLY leaves, by the suffix that PostgreSQL
# gives it: _ccnew for the new index, which is not complete, or _ccold for the old one.
_LEFT_OVER = """
SELECT format('%I.%I', n.nspname, i.relname)
FROM pg_inherits p
JOIN pg_index x ON x.indrelid = p.inhrelid AND NOT x.indisvalid
JOIN pg_class i ON i.oid = x.indexrelid
JOIN pg_namespace n ON n.oid = i.relnamespace
WHERE p.inhparent = 'messages'::regclass
  AND i.relname ~ '_topic_received_at_idx[0-9]*_cc(new|old)[0-9]*$'
"""


def rebuild_indexes(
    cursor: psycopg2.extensions.cursor, *, dry_run: bool
) -> Iterator[tuple[bool, str]]:
    """Rebuild the indexes with REINDEX CONCURRENTLY, which blocks neither INSERT nor SELECT.

    :param cursor: outside a transaction, in a session that `retention.prepare` has set up.
    :returns: for each month, True and a text that says what was done.
    :raises psycopg2.Error: an index could not be rebuilt; the old index is still in use.
    """
    month = "a past month"
    try:
        cursor.execute(_LEFT_OVER)
        for (index,) in [] if dry_run else cursor.fetchall():
            cursor.execute(f"DROP INDEX CONCURRENTLY {index}")
        cursor.execute(_FIND, (_WORTH_IT, _REBUILT))
        for index, month, before in cursor.fetchall():
            if dry_run:
                yield True, f"{month}: index of {before} bytes: would be rebuilt"
                continue
            cursor.execute(f"REINDEX INDEX CONCURRENTLY {index}")
            cursor.execute(f"COMMENT ON INDEX {index} IS '{_REBUILT}'")
            cursor.execute("SELECT pg_relation_size(%s)", (index,))
            [(after,)] = cursor.fetchall()
            yield True, f"{month}: index rebuilt, {before} bytes before and {after} after"
    except psycopg2.errors.LockNotAvailable:
        # A dump of the database may take hours.
        yield (
            True,
            f"{month}: index not rebuilt: waited too long for another transaction;"
            " the next run tries again",
        )
