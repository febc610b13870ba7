"""The settings of the view ``readings``: topic templates and device time keys.

They are saved in two small tables, so that a change applies to all messages, also to old ones.
"""

import re
from typing import NamedTuple, Self

import psycopg2.extensions

_NAMED_LEVEL = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]{0,62})\}")
_SPECIAL = re.compile(r"[.^$*+?()\[\]{}|\\]")  # in PostgreSQL's regular expressions
_STEP = re.compile(r"([^.\[\]]+)|\[([0-9]{1,9})\]")
_PATH = re.compile(r"([^.\[\]]+|\[[0-9]{1,9}\])(\.[^.\[\]]+|\[[0-9]{1,9}\])*")
_UNITS = ("iso8601", "s", "ms", "us")


class TopicTemplate(NamedTuple):
    """A topic template, also as a regular expression for PostgreSQL.

    :param pattern: a regular expression with a group for each name.
    """

    template: str
    pattern: str
    names: list[str]

    @classmethod
    def parse(cls, template: str) -> Self:
        """Parse a template.

        :raises ValueError: it is not valid.
        """
        *parents, last = template.split("/")
        names: list[str] = []
        patterns = [_level_pattern(level, names) for level in parents]
        if last == "#" and parents:
            pattern = "/".join(patterns) + "(?:/.*)?"  # a/# matches a (MQTT 5 §4.7.1.2)
        else:
            pattern = "/".join([*patterns, _level_pattern(last, names)])
        if not names:
            raise ValueError(f"{template[:80]!r} has no named level such as {{device}}")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{template[:80]!r} has two levels named {', '.join(sorted(twice))}")
        return cls(template, f"^{pattern}$", names)


def _level_pattern(level: str, names: list[str]) -> str:
    """Return the regular expression of a level; append its name, if it has one.

    :raises ValueError: the level is not valid.
    """
    if level == "+":
        return "[^/]*"
    if name := _NAMED_LEVEL.fullmatch(level):
        names.append(name[1])
        return "([^/]*)"
    if set(level) & set("{}+#\0"):
        raise ValueError(
            f"{level[:80]!r} is not a valid topic level: {{name}}, + and # each have to be a whole "
            "level, # the last one, and a name has letters, digits and _"
        )
    return _SPECIAL.sub(r"\\\g<0>", level)


class DeviceTimeKey(NamedTuple):
    """The path to the device time in a payload, as its steps, and the unit of the time."""

    path: list[str]
    unit: str

    @classmethod
    def parse(cls, key: str) -> Self:
        """Parse ``path:unit``, with the path as in the column ``name`` of ``readings``.

        :raises ValueError: it is not valid.
        """
        path, _, unit = key.rpartition(":")
        if unit not in _UNITS or not _PATH.fullmatch(path):
            raise ValueError(
                f"{key[:80]!r} is not of the form key:unit, where the unit is "
                f"{', '.join(_UNITS[:-1])} or {_UNITS[-1]}, and the key may be a path such as "
                "data.values[0].time"
            )
        return cls([step[1] or step[2] for step in _STEP.finditer(path)], unit)


def save(
    cursor: psycopg2.extensions.cursor, templates: list[TopicTemplate], keys: list[DeviceTimeKey]
) -> bool:
    """Write both tables if their rows differ; return whether that was possible.

    To be called in a transaction. It is not possible if the role lacks a privilege, or the tables
    do not exist.

    :raises psycopg2.Error: nothing was changed.
    """
    cursor.execute(_MAY_WRITE)
    if cursor.fetchall() != [(True,)]:
        return False
    # Collectors that start at the same time take turns; the last one wins.
    cursor.execute("SELECT pg_advisory_xact_lock(hashtext('iot.readings'))")
    for table, columns, rows in (
        ("topic_templates", "position, template, pattern, names", templates),
        ("device_time_keys", "position, path, unit", keys),
    ):
        wanted = [(position, *row) for position, row in enumerate(rows, 1)]
        cursor.execute(f"SELECT {columns} FROM {table} ORDER BY position")  # noqa: S608
        if cursor.fetchall() != wanted:
            cursor.execute(f"DELETE FROM {table}")  # noqa: S608
            for row in wanted:
                cursor.execute(f"INSERT INTO {table} ({columns}) VALUES %s", (row,))  # noqa: S608
    return True


_MAY_WRITE = """
SELECT bool_and(has_table_privilege(to_regclass(name), action))
FROM unnest(ARRAY['topic_templates', 'device_time_keys']) name,
     unnest(ARRAY['SELECT', 'INSERT', 'DELETE']) action
HAVING bool_and(to_regclass(name) IS NOT NULL)
"""
