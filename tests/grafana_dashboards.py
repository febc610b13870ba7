"""The Grafana dashboards, from this file. Run it to write their JSON files.

python tests/grafana_dashboards.py

Each panel has a title, a description, a unit and its queries. The layout follows from the order: a
row of single numbers on top, then rows of graphs and tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog import builder as cog
from grafana_foundation_sdk.cog import variants
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model

FOLDER = Path(__file__).parent.parent / "roles/grafana/files/dashboards"

PROMETHEUS = model.DataSourceRef("prometheus", "prometheus")
POSTGRES = model.DataSourceRef("postgres", "postgres")

Panel = stat.Panel | timeseries.Panel | table.Panel
GREEN, YELLOW, RED = "green", "yellow", "red"
# A single number is green, and another color from a value on.
Steps = Mapping[float, str]


class Sql(variants.Dataquery, cog.Builder[variants.Dataquery]):
    """A query of the PostgreSQL data source, for which the SDK has no class."""

    def __init__(self, sql: str, kind: Literal["table", "time_series"]) -> None:
        self.sql = sql.strip()
        self.kind = kind

    def build(self) -> Sql:
        return self

    def to_json(self) -> dict[str, object]:
        """The query as Grafana's JSON has it."""
        return {
            "datasource": POSTGRES,
            "editorMode": "code",
            "format": self.kind,
            "rawQuery": True,
            "rawSql": self.sql,
            "refId": "A",
        }


def prometheus_query(expression: str, legend: str, ref: str, *, instant: bool) -> Any:
    query = prometheus.Dataquery().datasource(PROMETHEUS).expr(expression.strip())
    query = query.legend_format(legend).ref_id(ref)
    return query.instant() if instant else query.range()


def thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    base = [model.Threshold(None, GREEN)]  # None: from minus infinity on
    more = [model.Threshold(value, color) for value, color in steps.items()]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(base + more)


def color(mode: model.FieldColorModeId) -> dashboard.FieldColor:
    return dashboard.FieldColor().mode(mode)


def options(words: Mapping[int, tuple[str, str]]) -> list[model.ValueMapping]:
    """Words and colors in the place of numbers."""
    results = {
        str(value): model.ValueMappingResult(text=text, color=color)
        for value, (text, color) in words.items()
    }
    return [model.ValueMap(options=results)] if results else []


def number(
    title: str,
    description: str,
    query: str | Sql,
    unit: str,
    *,
    steps: Steps | None = None,
    words: Mapping[int, tuple[str, str]] | None = None,
    trend: bool = False,
) -> stat.Panel:
    """A number of now, or the last one of a trend with its line."""
    target = query if isinstance(query, Sql) else None
    reduce = common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
    panel = stat.Panel().title(title).description(description).unit(unit).span(3).height(4)
    panel = panel.datasource(POSTGRES if target else PROMETHEUS).thresholds(thresholds(steps or {}))
    panel = panel.mappings(options(words or {})).reduce_options(reduce)
    panel = panel.graph_mode(
        common_model.BigValueGraphMode.AREA if trend else common_model.BigValueGraphMode.NONE
    )
    panel = panel.color_mode(common_model.BigValueColorMode.VALUE)
    panel = panel.color_scheme(color(model.FieldColorModeId.THRESHOLDS)).no_value("-")
    return panel.with_target(target or prometheus_query(str(query), title, "A", instant=not trend))


def graph(
    title: str,
    description: str,
    queries: Mapping[str, str] | Sql,
    unit: str,
    *,
    span: int = 8,
    limit: float | None = None,
) -> timeseries.Panel:
    """Lines over time, by their legend; ``limit`` draws a line at which something is wrong."""
    legend = common.VizLegendOptions().display_mode(common_model.LegendDisplayMode.TABLE)
    legend = legend.placement(common_model.LegendPlacement.BOTTOM).show_legend(True)
    legend = legend.calcs(["lastNotNull", "max"])
    tooltip = common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI)
    tooltip = tooltip.sort(common_model.SortOrder.DESCENDING)
    style = common.GraphThresholdsStyleConfig().mode(
        common_model.GraphThresholdsStyleMode.OFF
        if limit is None
        else common_model.GraphThresholdsStyleMode.DASHED
    )
    panel = timeseries.Panel().title(title).description(description).unit(unit)
    panel = panel.span(span).height(8).legend(legend).tooltip(tooltip).thresholds_style(style)
    panel = panel.thresholds(thresholds({} if limit is None else {limit: RED}))
    panel = panel.color_scheme(color(model.FieldColorModeId.PALETTE_CLASSIC))
    panel = panel.fill_opacity(10).line_width(1).show_points(common_model.VisibilityMode.AUTO)
    panel = panel.datasource(POSTGRES if isinstance(queries, Sql) else PROMETHEUS)
    if isinstance(queries, Sql):
        return panel.with_target(queries)
    for ref, (name, expression) in zip("ABCDEF", queries.items(), strict=False):
        panel = panel.with_target(prometheus_query(expression, name, ref, instant=False))
    return panel.axis_soft_min(0)


def rows(
    title: str,
    description: str,
    sql: str,
    *,
    span: int = 12,
    units: Mapping[str, str] | None = None,
) -> table.Panel:
    """A table; ``units`` are those of its columns."""
    panel = table.Panel().title(title).description(description).unit("none")
    panel = panel.filterable(True).span(span).height(10)
    panel = panel.datasource(POSTGRES).thresholds(thresholds({}))
    for column, unit in (units or {}).items():
        panel = panel.override_by_name(column, [model.DynamicConfigValue("unit", unit)])
    return panel.with_target(Sql(sql, "table"))


def make(
    uid: str,
    title: str,
    description: str,
    panels: Mapping[str, list[Panel]],
    variables: list[Any],
) -> dict[str, Any]:
    """A dashboard; ``panels`` by the title of their row, those of the first row without one."""
    made = dashboard.Dashboard(title).uid(uid).description(description).tags(["iot-system"])
    made = made.timezone("browser").refresh("15s").time("now-1h", "now").readonly()
    made = made.tooltip(model.DashboardCursorSync.CROSSHAIR).variables(variables)
    others = dashboard.DashboardLink("Dashboards").type(model.DashboardLinkType.DASHBOARDS)
    made = made.link(others.tags(["iot-system"]).as_dropdown(True).keep_time(True))
    for row, of_row in panels.items():
        if row:
            made = made.with_row(dashboard.Row(row))
        for panel in of_row:
            made = made.with_panel(panel)
    written: dict[str, Any] = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    for i, panel in enumerate(written["panels"], 1):
        panel["id"] = i
    return written


def choice(name: str, label: str, description: str, source: model.DataSourceRef) -> Any:
    """A variable of which one, several or all values can be chosen."""
    variable = dashboard.QueryVariable(name).label(label).description(description)
    variable = variable.datasource(source).refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
    return (
        variable.multi(True)
        .include_all(True)
        .current(model.VariableOption(None, ["All"], ["$__all"]))
    )


# Pipeline ------------------------------------------------------------------------------------

HERE = 'instance=~"$instance"'
UNACCOUNTED = f"""
mqtt_messages_total{{{HERE}}}
- db_inserts_total{{{HERE}}}
- db_duplicates_total{{{HERE}}}
- (sum without (reason) (db_dead_letters_total{{{HERE}}}) or 0 * db_inserts_total{{{HERE}}})
- messages_in_flight{{{HERE}}}
"""


def rate(metric: str, labels: str = HERE) -> str:
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def quantiles(metric: str, *shares: float) -> dict[str, str]:
    buckets = rate(f"{metric}_bucket")
    return {
        f"p{share * 100:g}": f"histogram_quantile({share}, sum by (le) ({buckets}))"
        for share in shares
    }


COLLECTORS = {0: ("down", RED), 1: ("up", GREEN)}
BROKERS = {0: ("away", RED), 1: ("connected", GREEN)}

PIPELINE: dict[str, list[Panel]] = {
    "": [
        number(
            "Collector",
            "Whether Prometheus reaches every collector that is selected. When it does not, "
            "messages wait in the broker, whose queue is bounded.",
            f'min(up{{job="collector", {HERE}}})',
            "none",
            words=COLLECTORS,
        ),
        number(
            "Broker",
            "Whether every selected collector is connected to the broker and subscribed. When not, "
            "nothing is received.",
            f"min(mqtt_connected{{{HERE}}})",
            "none",
            words=BROKERS,
        ),
        number(
            "Stored",
            "Messages committed to the table per second.",
            f"sum({rate('db_inserts_total')})",
            "cps",
            trend=True,
        ),
        number(
            "Delay, p99",
            "From receipt of a message to its COMMIT: 99 of 100 took no longer. Empty while no "
            "messages arrive.",
            quantiles("message_delay_seconds", 0.99)["p99"],
            "s",
            steps={1: YELLOW, 10: RED},
            trend=True,
        ),
        number(
            "In flight now",
            "Messages received and not committed yet. It follows the batches, and grows only while "
            "the database does not take them.",
            f"sum(messages_in_flight{{{HERE}}})",
            "short",
        ),
        number(
            "Oldest un-acked",
            "How long the oldest message has waited for its COMMIT. An alert fires above a minute.",
            f"max(oldest_unacked_message_seconds{{{HERE}}})",
            "s",
            steps={10: YELLOW, 60: RED},
        ),
        number(
            "Unaccounted",
            "Messages received that are neither stored, nor duplicates, nor dead letters, nor in "
            "flight. Anything but 0 is a bug.",
            f"sum(abs({UNACCOUNTED}))",
            "short",
            steps={1: RED},
        ),
        number(
            "Dead letters",
            "Messages the database refused in the time shown. They are kept, with the reason, in "
            "the table below.",
            f"sum(increase(db_dead_letters_total{{{HERE}}}[$__range])) or vector(0)",
            "short",
            steps={1: YELLOW},
        ),
    ],
    "Flow": [
        graph(
            "Messages",
            "Received from the broker, and committed to the table. The lines part while the "
            "database does not keep up.",
            {
                "received": f"sum({rate('mqtt_messages_total')})",
                "stored": f"sum({rate('db_inserts_total')})",
            },
            "cps",
            span=12,
        ),
        graph(
            "Duplicates and dead letters",
            "Sent again by the broker and not stored again, and refused by the database, by "
            "reason. Duplicates are usual after a reconnect.",
            {
                "duplicates": f"sum({rate('db_duplicates_total')})",
                "dead letters: {{reason}}": f"sum by (reason) ({rate('db_dead_letters_total')})",
            },
            "cps",
            span=12,
        ),
        graph(
            "Delay from receipt to COMMIT",
            "How long messages take through the collector: half of them, 95 and 99 of 100, no "
            "longer than this. Gaps are times without messages.",
            quantiles("message_delay_seconds", 0.5, 0.95, 0.99),
            "s",
        ),
        graph(
            "Oldest un-acked message",
            "Age of the oldest message that is not committed yet. An alert fires above the line.",
            {"{{instance}}": f"oldest_unacked_message_seconds{{{HERE}}}"},
            "s",
            limit=60,
        ),
        graph(
            "In flight",
            "Messages in the collector's buffer: received and not committed yet. The broker sends "
            "no more than its window (max_inflight_messages) ahead.",
            {"{{instance}}": f"messages_in_flight{{{HERE}}}"},
            "short",
        ),
    ],
    "Storing": [
        graph(
            "Time to store a batch",
            "One transaction, retries included: half of them, and 99 of 100, no longer than this.",
            quantiles("db_flush_seconds", 0.5, 0.99),
            "s",
        ),
        graph(
            "Messages in a batch",
            "Large batches cost less CPU time for a message; they form when much arrives.",
            {
                "average": f"sum({rate('db_batch_rows_sum')}) / sum({rate('db_batch_rows_count')})",
                **quantiles("db_batch_rows", 0.99),
            },
            "short",
        ),
        graph(
            "Database errors",
            "Failed operations by kind. Nothing is lost: the collector tries again and "
            "acknowledges nothing meanwhile.",
            {"{{kind}}": f"sum by (kind) ({rate('db_errors_total')})"},
            "cps",
        ),
    ],
    "Connections and process": [
        graph(
            "Up and connected",
            "Whether Prometheus reaches the collector, and whether the collector is connected to "
            "the broker.",
            {
                "up: {{instance}}": f'up{{job="collector", {HERE}}}',
                "connected: {{instance}}": f"mqtt_connected{{{HERE}}}",
            },
            "bool_on_off",
        ),
        graph(
            "Reconnects and connection errors",
            "Connections to the broker after the first, and failed ones by kind.",
            {
                "reconnects": f"sum({rate('mqtt_reconnects_total')})",
                "errors: {{kind}}": f"sum by (kind) ({rate('mqtt_errors_total')})",
            },
            "cps",
        ),
        graph(
            "Unaccounted messages",
            "Received - stored - duplicates - dead letters - in flight. The collector counts them "
            "as one snapshot, so this is 0 at every scrape.",
            {"{{instance}}": UNACCOUNTED},
            "short",
        ),
        graph(
            "Memory",
            "Resident memory. It is bounded by the window of the broker and stays flat.",
            {"{{instance}}": f'process_resident_memory_bytes{{job="collector", {HERE}}}'},
            "bytes",
            span=12,
        ),
        graph(
            "CPU",
            "Processor time per second: 100% is one core.",
            {"{{instance}}": rate("process_cpu_seconds_total", f'job="collector", {HERE}')},
            "percentunit",
            span=12,
        ),
    ],
    "Refused messages": [
        rows(
            "Latest dead letters",
            "The last fifty messages that the database refused in the time shown, with the reason. "
            "Topic and payload are escaped bytes, the payload's first 200.",
            """
SELECT stored_at AS time, reason, sqlstate, encode(topic, 'escape') AS topic,
       encode(substring(payload FOR 200), 'escape') AS payload
FROM dead_letters
WHERE $__timeFilter(stored_at)
ORDER BY id DESC
LIMIT 50
""",
            span=24,
        ),
    ],
}

INSTANCE = (
    choice("instance", "Collector", "One or more collectors, by their address", PROMETHEUS)
    .query(
        {
            "qryType": 1,
            "query": "label_values(mqtt_messages_total, instance)",
            "refId": "instance",
        }
    )
    .all_value(".*")
    .sort(model.VariableSort.ALPHABETICAL_ASC)
)

# Readings ------------------------------------------------------------------------------------

# As an array, so that it is valid SQL when there is nothing to choose from. Grafana writes
# 'one','two', with quotes doubled.
OF_TOPIC = "topic = ANY (ARRAY[${topic:sqlstring}])"
OF_NAME = "name = ANY (ARRAY[${name:sqlstring}])"

# The topics of the time shown, with their levels as in the view `readings` (docs/payloads.md).
TOPICS = """
SELECT topic, (
  SELECT jsonb_object(t.names, regexp_match(topic, t.pattern))
  FROM topic_templates t WHERE topic ~ t.pattern ORDER BY t.position LIMIT 1
) AS levels
FROM (SELECT DISTINCT topic FROM messages WHERE $__timeFilter(received_at)) seen
""".strip()
ANY_LEVEL = "(any)"

READINGS: dict[str, list[Panel]] = {
    "": [
        number(
            "Messages",
            "Messages of all topics that were stored in the time shown.",
            Sql(
                "SELECT count(*) AS messages FROM messages WHERE $__timeFilter(received_at)",
                "table",
            ),
            "short",
        ).span(6),
        number(
            "Topics",
            "Topics with a message in the time shown.",
            Sql(
                "SELECT count(DISTINCT topic) AS topics FROM messages"
                " WHERE $__timeFilter(received_at)",
                "table",
            ),
            "short",
        ).span(6),
        number(
            "Silent topics",
            "Topics with a message in the time shown, and none for as long as is chosen above.",
            Sql(
                """
SELECT count(*) AS topics
FROM (
  SELECT topic FROM messages WHERE $__timeFilter(received_at)
  GROUP BY topic
  HAVING max(received_at) < now() - interval '$silent_after'
) silent
""",
                "table",
            ),
            "short",
            steps={1: YELLOW},
        ).span(6),
        number(
            "Last message",
            "How long ago the last message of any topic was stored.",
            Sql(
                "SELECT extract(epoch FROM now() - max(received_at)) AS age FROM messages"
                " WHERE $__timeFilter(received_at)",
                "table",
            ),
            "s",
            steps={300: YELLOW, 3600: RED},
        ).span(6),
    ],
    "Chosen readings": [
        graph(
            "Readings",
            "The average of each chosen reading, for each point of the graph.",
            Sql(
                f"""
SELECT $__timeGroup(time, $__interval) AS time, concat(topic, ' ', name) AS metric,
       avg(value) AS value
FROM readings
WHERE $__timeFilter(time) AND {OF_TOPIC} AND {OF_NAME} AND value IS NOT NULL
GROUP BY 1, 2
ORDER BY 1
""",
                "time_series",
            ),
            "none",
            span=24,
        ).height(12),
        rows(
            "Latest readings",
            "The last value of each chosen reading in the time shown, and its age.",
            f"""
SELECT topic, name, value, text, time, extract(epoch FROM now() - time) AS age
FROM (
  SELECT DISTINCT ON (topic, name) topic, name, value, text, time
  FROM readings
  WHERE $__timeFilter(time) AND {OF_TOPIC} AND {OF_NAME}
  ORDER BY topic, name, time DESC
) latest
ORDER BY topic, name
LIMIT 200
""",
            units={"age": "s"},
        ),
        rows(
            "Silent topics, longest first",
            "Topics with a message in the time shown, and none for as long as is chosen above.",
            """
SELECT topic, max(received_at) AS "last message",
       extract(epoch FROM now() - max(received_at)) AS "silent for", count(*) AS messages
FROM messages
WHERE $__timeFilter(received_at)
GROUP BY topic
HAVING max(received_at) < now() - interval '$silent_after'
ORDER BY max(received_at)
LIMIT 200
""",
            units={"silent for": "s"},
        ),
    ],
    "All topics": [
        graph(
            "Messages per minute by topic",
            "Rows of the table: the ten topics with most of them in the time shown, and all others "
            "together.",
            Sql(
                """
WITH counts AS (
  SELECT $__timeGroup(received_at, $__interval, 0) AS time, topic, count(*) AS messages
  FROM messages
  WHERE $__timeFilter(received_at)
  GROUP BY 1, 2
), top AS (
  SELECT topic FROM counts GROUP BY topic ORDER BY sum(messages) DESC LIMIT 10
)
SELECT time, coalesce(top.topic, 'all others') AS metric,
       sum(messages) * 60000.0 / $__interval_ms AS value
FROM counts LEFT JOIN top USING (topic)
GROUP BY 1, 2
ORDER BY 1
""",
                "time_series",
            ),
            "cpm",
            span=24,
        ),
        rows(
            "Latest messages",
            "The last fifty messages of the chosen topics in the time shown. The payload's first "
            "200 bytes are shown, escaped.",
            f"""
SELECT received_at AS time, topic, qos, retained,
       encode(substring(payload FOR 200), 'escape') AS payload
FROM messages
WHERE $__timeFilter(received_at) AND {OF_TOPIC}
ORDER BY received_at DESC
LIMIT 50
""",
            span=24,
        ),
    ],
}


def sql_choice(name: str, label: str, description: str, sql: str) -> Any:
    return choice(name, label, description, POSTGRES).query(sql)


READINGS_VARIABLES = [
    sql_choice(
        "level",
        "Topic level",
        "A named level of topics (collector_topic_templates), to choose topics by",
        f"""
SELECT name
FROM (SELECT 0 AS place, '{ANY_LEVEL}' AS name
      UNION SELECT 1, unnest(names) FROM topic_templates) levels
ORDER BY place, name
""".strip(),
    )
    .multi(False)
    .include_all(False)
    .current(model.VariableOption(None, ANY_LEVEL, ANY_LEVEL)),
    sql_choice(
        "level_value",
        "Value of the level",
        "The first 500 values of this level in the time shown",
        f"""
SELECT DISTINCT levels ->> ${{level:sqlstring}}
FROM ({TOPICS}) topics
WHERE levels ->> ${{level:sqlstring}} IS NOT NULL
ORDER BY 1
LIMIT 500
""".strip(),
    ),
    sql_choice(
        "topic",
        "Topic",
        "The first 500 topics, by name, with a message in the time shown and the chosen level",
        f"""
SELECT topic
FROM ({TOPICS}) topics
WHERE ${{level:sqlstring}} = '{ANY_LEVEL}'
   OR levels ->> ${{level:sqlstring}} = ANY (ARRAY[${{level_value:sqlstring}}])
ORDER BY 1
LIMIT 500
""".strip(),
    ),
    sql_choice(
        "name",
        "Reading",
        "The first 200 names of the chosen topics' readings",
        f"SELECT DISTINCT name FROM readings WHERE $__timeFilter(time) AND {OF_TOPIC}"
        " ORDER BY 1 LIMIT 200",
    ),
    dashboard.CustomVariable("silent_after")
    .label("Silent after")
    .description("How long a topic without a message counts as silent")
    .values("1 minute,5 minutes,1 hour,6 hours,1 day")
    .current(model.VariableOption(None, "5 minutes", "5 minutes")),
]

# Broker and database -------------------------------------------------------------------------

OURS = 'datname!~"template.|postgres"'


def broker(metric: str) -> str:
    """Each collector reports the same broker, so this takes the maximum and no sum."""
    return f"max({rate(metric, '')})".replace("{}", "")


def database(metric: str) -> str:
    return f"sum({rate(metric, OURS)})"


HITS = database("pg_stat_database_blks_hit")

BROKER_AND_DATABASE: dict[str, list[Panel]] = {
    "": [
        number(
            "Broker's metrics",
            "Whether a collector is connected to the broker for the metrics of the first two rows.",
            "max(mqtt_broker_metrics_connected)",
            "none",
            words=BROKERS,
        ),
        number(
            "Broker's uptime",
            "Time since the broker's start.",
            "max(mqtt_broker_uptime_seconds)",
            "dtdurations",
        ),
        number(
            "Dropped",
            "Messages that the broker dropped in the time shown, because a client's queue was "
            "full. They are lost for that client.",
            "max(increase(mqtt_broker_messages_dropped_total[$__range]))",
            "short",
            steps={1: RED},
        ),
        number(
            "Clients",
            "Clients that are connected to the broker, the collectors among them.",
            'max(mqtt_broker_clients{state="connected"})',
            "short",
        ),
        number(
            "PostgreSQL",
            "Whether the exporter reaches PostgreSQL. It runs on the host platform.",
            "min(pg_up)",
            "none",
            words=COLLECTORS,
        ),
        number(
            "Connections",
            "Share of the connections that PostgreSQL allows.",
            "sum(pg_stat_database_numbackends) / max(pg_settings_max_connections)",
            "percentunit",
            steps={0.7: YELLOW, 0.9: RED},
        ),
        number(
            "Database size",
            "Size on disk of the database, indexes included.",
            f"sum(pg_database_size_bytes{{{OURS}}})",
            "bytes",
        ),
        number(
            "Partitions ahead",
            "For how long there are partitions for new messages. Collectors make them ahead.",
            "max(db_partitions_until_timestamp_seconds) - time()",
            "dtdurations",
        ),
    ],
    "Broker: traffic": [
        graph(
            "Messages through the broker",
            "PUBLISH packets that the broker received and sent. It sends one for each subscriber.",
            {
                "received": broker("mqtt_broker_messages_received_total"),
                "sent": broker("mqtt_broker_messages_sent_total"),
            },
            "cps",
        ),
        graph(
            "Messages dropped by the broker",
            "Messages that the broker dropped because a client's queue was full. The collector "
            "does not see them.",
            {"dropped": broker("mqtt_broker_messages_dropped_total")},
            "cps",
        ),
        graph(
            "Bytes through the broker",
            "Bytes of all packets.",
            {
                "received": broker("mqtt_broker_received_bytes_total"),
                "sent": broker("mqtt_broker_sent_bytes_total"),
            },
            "Bps",
        ),
    ],
    "Broker: clients and memory": [
        graph(
            "Messages in the broker's memory",
            "Queued for clients, in flight and retained. It grows while a session is away or slow.",
            {
                "all": "max(mqtt_broker_stored_messages)",
                "retained": "max(mqtt_broker_retained_messages)",
            },
            "short",
        ),
        graph(
            "Broker's memory",
            "What the broker has allocated, at most since its start, and the payloads in it.",
            {
                "allocated": "max(mqtt_broker_heap_bytes)",
                "maximum": "max(mqtt_broker_heap_maximum_bytes)",
                "payloads": "max(mqtt_broker_stored_bytes)",
            },
            "bytes",
        ),
        graph(
            "Clients and subscriptions",
            "Clients that are connected, sessions whose client is away, and their subscriptions.",
            {
                "clients {{state}}": "max by (state) (mqtt_broker_clients)",
                "subscriptions": "max(mqtt_broker_subscriptions)",
                "shared subscriptions": "max(mqtt_broker_shared_subscriptions)",
                "sessions expired": "max(mqtt_broker_clients_expired_total)",
            },
            "short",
        ),
    ],
    "PostgreSQL: activity": [
        graph(
            "Transactions",
            "Transactions that were committed and rolled back.",
            {
                "committed": database("pg_stat_database_xact_commit"),
                "rolled back": database("pg_stat_database_xact_rollback"),
            },
            "cps",
        ),
        graph(
            "Rows",
            "Rows that were inserted, and that queries fetched by an index or returned from scans.",
            {
                "inserted": database("pg_stat_database_tup_inserted"),
                "fetched": database("pg_stat_database_tup_fetched"),
                "returned": database("pg_stat_database_tup_returned"),
            },
            "cps",
        ),
        graph(
            "Cache hits",
            "Share of the blocks that were in PostgreSQL's own cache. Others come from the "
            "system's cache or from disk.",
            {
                "hits": f"{HITS} / ({HITS} + {database('pg_stat_database_blks_read')})",
            },
            "percentunit",
        ),
        graph(
            "Connections by state",
            "Connections to the database by what they do.",
            {"{{state}}": f"sum by (state) (pg_stat_activity_count{{{OURS}}})"},
            "short",
        ),
        graph(
            "Longest transaction",
            "How long the oldest open transaction has run. Long ones keep VACUUM from cleaning up.",
            {"longest": f"max(pg_stat_activity_max_tx_duration{{{OURS}}})"},
            "s",
            limit=300,
        ),
        graph(
            "Locks",
            "Locks by mode. AccessExclusiveLock keeps everybody else from the table.",
            {"{{mode}}": f"sum by (mode) (pg_locks_count{{{OURS}}})"},
            "short",
        ),
        graph(
            "Size of the database",
            "Size on disk, indexes included.",
            {"{{datname}}": f"max by (datname) (pg_database_size_bytes{{{OURS}}})"},
            "bytes",
            span=12,
        ),
        graph(
            "Deadlocks and temporary files",
            "Deadlocks, and files that queries wrote because work_mem was too small.",
            {
                "deadlocks": database("pg_stat_database_deadlocks"),
                "temporary files": database("pg_stat_database_temp_files"),
            },
            "cps",
            span=12,
        ),
    ],
}


def dashboards() -> dict[str, dict[str, Any]]:
    """The dashboards by their uid."""
    made = [
        make(
            "pipeline",
            "Pipeline",
            "From the broker through the collector to the table: how much, how fast, and whether "
            "every message is accounted for.",
            PIPELINE,
            [INSTANCE],
        ),
        make(
            "readings",
            "Readings",
            "What devices send: their readings over time, the latest values, and who is silent.",
            READINGS,
            READINGS_VARIABLES,
        ),
        make(
            "broker-database",
            "Broker and database",
            "What Mosquitto and PostgreSQL know of themselves.",
            BROKER_AND_DATABASE,
            [],
        ),
    ]
    return {str(one["uid"]): one for one in made}


def text(one: dict[str, Any]) -> str:
    """A dashboard as its file has it."""
    return json.dumps(one, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for uid, one in dashboards().items():
        (FOLDER / f"{uid}.json").write_text(text(one))
