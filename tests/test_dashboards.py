"""The structure of each dashboard is valid, and each of its queries returns data.

PromQL runs in a real Prometheus, which scrapes a real collector and postgres_exporter. SQL runs in
the real database with the read-only role. The data come from real traffic with a dead letter and a
lost database connection. `prometheus_query` and `sql_query` replace the variables and macros as
Grafana does. Grafana itself is not used.
"""

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml
from grafana_dashboards import FOLDER, dashboards, text
from rendering import MONITOR, OWNER, READER, ROLES, Roles, render

from testing.collector import Collector, run_command
from testing.mosquitto import Mosquitto
from testing.postgres import Database, Postgres
from testing.postgres_exporter import PostgresExporter
from testing.prometheus import Prometheus
from testing.publisher import publish
from testing.service import HOST, eventually

DASHBOARDS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((ROLES / "grafana/files").glob("dashboards*/*.json"))
}
PANELS = [
    pytest.param(panel, id=f"{name}-{panel['title']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    if panel["type"] != "row"
]
QUERIES = [
    pytest.param(target, id=f"{name}-{panel['title']}-{target['refId']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    for target in panel.get("targets", [])
]


METRIC = r"\b(?:(?:db|messages|mqtt|message|oldest|pg|process)_\w+|up)\b"


def queries_of_kind(kind: str) -> Sequence[Any]:
    """The queries for a kind of data source, without the AWS dashboard (test_aws_dashboard.py)."""
    found: list[Any] = [param for param in QUERIES if not str(param.id).startswith("aws-")]
    return [param for param in found if param.values[0]["datasource"]["type"] == kind]


# Variables and macros ------------------------------------------------------------------------


def prometheus_query(expression: str, instance: str = ".*") -> str:
    """Replace the variables of a PromQL expression, as Grafana's Prometheus data source does.

    ``$__rate_interval`` is at least four scrapes. Here it is longer, for a busy machine.
    ``$__range`` is the time range of the dashboard. ``$instance`` is a variable of the dashboard:
    ``.*`` for "All" (its ``allValue``), or an address escaped for a regular expression.
    """
    values = {"$__rate_interval": "10s", "$__range": "60s", "$instance": instance}
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, f"unknown variable: {expression}"
    return expression


# The selected values of the variables of *Readings*. Grafana doubles quotes in a value.
SELECTED = {
    "${topic:sqlstring}": "'iot/device-0','iot/device-1','iot/it''s gone'",
    "${name:sqlstring}": "'temperature'",
    "$silent_after": "3 seconds",
    "${level:sqlstring}": "'(any)'",
    "${level_value:sqlstring}": "''",
}


def sql_query(sql: str, start: datetime, end: datetime, interval: int = 60) -> str:
    """Replace the variables and macros of a query, as Grafana's PostgreSQL data source does.

    ``$__interval`` (seconds between two points) is replaced first, then the macros. As in Grafana,
    the arguments of a macro have no parentheses. Grafana fills gaps with the third argument of
    ``$__timeGroup``, which is not part of the SQL.
    https://grafana.com/docs/grafana/latest/datasources/postgres/query-editor/#macros
    """
    sql = sql.replace("$__interval_ms", str(interval * 1000)).replace("$__interval", f"{interval}s")
    for name, value in SELECTED.items():
        sql = sql.replace(name, value)

    def macro(found: re.Match[str]) -> str:
        name, arguments = found[1], [part.strip() for part in found[2].split(",")]
        column = arguments[0]
        if name == "timeFilter":
            return f"{column} BETWEEN '{start.isoformat()}' AND '{end.isoformat()}'"
        if name == "timeGroup":
            seconds = int(arguments[1].strip("'").removesuffix("s"))
            return f"floor(extract(epoch from {column})/{seconds})*{seconds}"
        raise AssertionError(f"unknown macro: {name}")

    sql = re.sub(r"\$__(\w+)\(([^)]*)\)", macro, sql)
    assert "$" not in sql, f"unknown variable: {sql}"
    return sql


# Real services -------------------------------------------------------------------------------


@dataclass
class Installation:
    """The services that the dashboards query, and the time range with traffic."""

    prometheus: Prometheus
    reader: Database
    messages: int
    start: datetime
    end: datetime


@pytest.fixture(scope="module")
def installation(
    _initialised: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """Services after six seconds of traffic on 13 topics, a dead letter and a database error."""
    with contextlib.ExitStack() as stack:
        postgres = _initialised.copy(stack.enter_context(Postgres.directory()))
        stack.enter_context(contextlib.closing(postgres)).start()
        roles = Roles(postgres)
        assert roles.apply().returncode == 0
        owner = roles.database(OWNER)
        assert run_command("migrate", **owner.environment()).returncode == 0
        owner.query("ALTER TABLE messages ADD CHECK (payload <> 'poison'::bytea)")

        broker = Mosquitto(tmp_path_factory.mktemp("broker"), "sys_interval 1")
        stack.enter_context(contextlib.closing(broker)).start()
        collector = Collector(
            tmp_path_factory.mktemp("collector"),
            broker,
            owner,
            IOT_BROKER_METRICS="true",
            IOT_TOPIC_TEMPLATES="iot/{device}",
        )
        stack.enter_context(contextlib.closing(collector)).start()
        exporter = PostgresExporter(
            tmp_path_factory.mktemp("exporter"), roles.database(MONITOR), roles.file(MONITOR)
        )
        stack.enter_context(contextlib.closing(exporter)).start()
        target = f"{HOST}:{collector.settings['IOT_HTTP_PORT']}"
        prometheus = Prometheus(
            tmp_path_factory.mktemp("prometheus"), target, postgres=exporter.address
        )
        stack.enter_context(contextlib.closing(prometheus)).start()

        start, sent = datetime.now(UTC), 1
        publish(
            broker, [("iot/it's gone", b'{"temperature": 7}')]
        )  # this topic is silent from now on
        for second in range(6):
            for topic in range(12):
                publish(broker, [(f"iot/device-{topic}", b'{"temperature": %d}' % second)])
                sent += 1
            if second == 1:
                publish(broker, [("iot/device-0", b"poison")])
            if second == 2:
                postgres.query(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'iot-collector'"
                )
            time.sleep(1)
        collector.wait_settled(sent + 1)
        seen = f"mqtt_messages_total == {sent + 1} and messages_in_flight == 0"
        eventually(
            lambda: prometheus.get("query", query=seen)["result"],
            what="Prometheus has scraped the collector",
        )
        yield Installation(prometheus, roles.database(READER), sent, start, datetime.now(UTC))


@pytest.mark.parametrize("target", queries_of_kind("prometheus"))
def test_prometheus_query_returns_data(target: dict[str, Any], installation: Installation) -> None:
    prometheus = installation.prometheus
    start, end = installation.start.timestamp(), installation.end.timestamp()
    for instance in (".*", prometheus.target.replace(".", r"\\.")):
        query = prometheus_query(target["expr"], instance)
        assert prometheus.numbers(query, start, end), query


@pytest.mark.parametrize("target", queries_of_kind("prometheus"))
def test_metrics_of_each_query_exist(target: dict[str, Any], installation: Installation) -> None:
    """Also those in branches of an `or` that the test above did not need."""
    there = set(installation.prometheus.get("label/__name__/values"))
    named = set(re.findall(METRIC, target["expr"]))
    assert named
    assert named <= there


@pytest.mark.parametrize("target", queries_of_kind("postgres"))
def test_sql_query_returns_data(target: dict[str, Any], installation: Installation) -> None:
    sql = sql_query(target["rawSql"], installation.start, installation.end)
    assert installation.reader.query(sql)


def query_by_title(title: str) -> str:
    (query,) = [
        panel["targets"][0].get("expr") or panel["targets"][0]["rawSql"]
        for name, dashboard in DASHBOARDS.items()
        for panel in dashboard["panels"]
        if name != "aws" and panel["title"] == title and panel["type"] != "row"
    ]
    return str(query)


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        *(("Collector", 1), ("Broker", 1), ("In flight now", 0), ("Unaccounted", 0)),
        *(("Broker's metrics", 1), ("PostgreSQL", 1), ("Dropped", 0)),
    ],
)
def test_single_number_is_correct(title: str, expected: float, installation: Installation) -> None:
    result = installation.prometheus.get("query", query=prometheus_query(query_by_title(title)))
    assert [float(series["value"][1]) for series in result["result"]] == [expected]


def test_sum_of_stored_rates_equals_the_stored_messages(installation: Installation) -> None:
    start, end = installation.start.timestamp() - 5, installation.end.timestamp() + 15
    rates = installation.prometheus.numbers(prometheus_query(query_by_title("Stored")), start, end)
    assert sum(rates) == pytest.approx(installation.messages, rel=0.25)


@pytest.mark.parametrize("interval", [1, 60, 3600])
def test_messages_per_minute_count_each_message_once(
    interval: int, installation: Installation
) -> None:
    """There are ten topics and "all others". The sum is correct for each interval."""
    sql = sql_query(
        query_by_title("Messages per minute by topic"),
        installation.start,
        installation.end,
        interval,
    )
    rows = installation.reader.query(sql)
    assert len({topic for _, topic, _ in rows}) == 11  # of 13
    assert "all others" in {topic for _, topic, _ in rows}
    assert sum(value for *_, value in rows) * interval / 60 == pytest.approx(installation.messages)


def test_tables_show_the_latest_rows(installation: Installation) -> None:
    def rows_of(title: str) -> list[Any]:
        between = (installation.start, installation.end)
        return installation.reader.query(sql_query(query_by_title(title), *between))

    readings = [(topic, name, value) for topic, name, value, *_ in rows_of("Latest readings")]
    assert readings == [
        *(("iot/device-0", "temperature", 5), ("iot/device-1", "temperature", 5)),
        ("iot/it's gone", "temperature", 7),
    ]
    (first, *_) = rows_of("Silent topics, longest first")
    assert first[0] == "iot/it's gone"
    assert {topic for _, topic, *_ in rows_of("Latest messages")} == {
        topic for topic, *_ in readings
    }
    ((_, reason, sqlstate, topic, payload),) = rows_of("Latest dead letters")
    assert "check" in reason
    assert (sqlstate, topic, payload) == ("23514", "iot/device-0", "poison")


def test_no_selected_topic_gives_no_readings(installation: Installation) -> None:
    """Grafana replaces a variable without a value by ''."""
    sql = query_by_title("Latest readings").replace("${topic:sqlstring}", "''")
    assert installation.reader.query(sql_query(sql, installation.start, installation.end)) == []


def test_variable_instance_lists_the_collector(installation: Installation) -> None:
    (variable,) = DASHBOARDS["pipeline"]["templating"]["list"]
    query = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert query, variable
    metric, label = query.groups()
    values = installation.prometheus.get(f"label/{label}/values", **{"match[]": metric})
    assert values == [installation.prometheus.target]


def values_of(name: str, installation: Installation, **selected: str) -> list[str]:
    """The values of a variable of *Readings*."""
    (sql,) = [
        one["query"] for one in DASHBOARDS["readings"]["templating"]["list"] if one["name"] == name
    ]
    for variable, value in selected.items():
        sql = sql.replace(f"${{{variable}:sqlstring}}", value)
    rows = installation.reader.query(sql_query(sql, installation.start, installation.end))
    return [value for (value,) in rows]


def test_variables_list_topics_and_names(installation: Installation) -> None:
    assert len(values_of("topic", installation)) == 13
    assert values_of("name", installation) == ["temperature"]


def test_topics_can_be_filtered_by_level(installation: Installation) -> None:
    assert values_of("level", installation) == ["(any)", "device"]
    devices = values_of("level_value", installation, level="'device'")
    assert len(devices) == 13
    selected = {"level": "'device'", "level_value": "'device-3','it''s gone'"}
    assert values_of("topic", installation, **selected) == ["iot/device-3", "iot/it's gone"]


# Structure -----------------------------------------------------------------------------------


def test_files_are_current() -> None:
    written = {path.stem: path.read_text() for path in FOLDER.glob("*.json")}
    made = {uid: text(one) for uid, one in dashboards().items()}
    assert written == made, "run: .venv/bin/python tests/grafana_dashboards.py"


@pytest.fixture(params=DASHBOARDS)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = DASHBOARDS[request.param]
    return found


def test_pipeline_dashboard_exists() -> None:
    assert "pipeline" in DASHBOARDS


def test_dashboard_has_its_uid_as_file_name(dashboard: dict[str, Any]) -> None:
    assert DASHBOARDS[dashboard["uid"]] is dashboard, "file name and uid are equal"
    assert dashboard["title"]
    assert dashboard["description"]
    assert dashboard["timezone"] == "browser"
    assert dashboard["refresh"] in ("15s", "1m")
    assert dashboard["schemaVersion"] >= 41
    assert "id" not in dashboard, "Grafana assigns the id"


@pytest.mark.parametrize("key", ["id", "title"])
def test_ids_and_titles_of_panels_are_unique(dashboard: dict[str, Any], key: str) -> None:
    values = [panel[key] for panel in dashboard["panels"]]
    assert len(values) == len(set(values))


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} covers {taken[x, y]}"
                taken[x, y] = panel["title"]


@pytest.mark.parametrize("panel", PANELS)
def test_panel_is_complete(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert panel["targets"]
    refs = [target["refId"] for target in panel["targets"]]
    assert len(refs) == len(set(refs))


@pytest.mark.parametrize("target", QUERIES)
def test_data_source_is_provisioned(target: dict[str, Any]) -> None:
    provisioned = yaml.safe_load(
        render(
            "grafana/datasources.yml.j2",
            grafana_prometheus_url="http://127.0.0.1:9090",
            grafana_database_address="127.0.0.1:5432",
            grafana_database_name="iot",
            grafana_database_user="iot_reader",
            grafana_database_sslmode="disable",
            iot_database_ca_file="",
            __grafana_here={"secrets": "/secrets"},
        )
    )
    pairs = [(source["uid"], source["type"]) for source in provisioned["datasources"]]
    assert (target["datasource"]["uid"], target["datasource"]["type"]) in pairs


@pytest.mark.parametrize("target", queries_of_kind("prometheus"))
def test_each_query_has_a_legend(target: dict[str, Any]) -> None:
    assert target["legendFormat"]


PIPELINE = [
    param for param in queries_of_kind("prometheus") if str(param.id).startswith("pipeline-")
]


@pytest.mark.parametrize("target", PIPELINE)
def test_query_filters_by_the_selected_collectors(target: dict[str, Any]) -> None:
    for selector in re.findall(r"\{[^}]*\}", target["expr"]):
        assert 'instance=~"$instance"' in selector
