"""Every dashboard is sound, and each of its queries returns data.

The queries run against a real Prometheus, which scrapes a real collector and a real exporter of
PostgreSQL, and as the read-only role against the real database, after real traffic with a dead
letter and a lost database connection in it. What Grafana does to a query before it sends it is done
here by `prometheus_query` and `sql_query`. Grafana itself takes no part.
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


def of_kind(kind: str) -> Sequence[Any]:
    """Queries of a kind, but those of the dashboard of AWS: test_aws_dashboard.py has them."""
    found: list[Any] = [param for param in QUERIES if not str(param.id).startswith("aws-")]
    return [param for param in found if param.values[0]["datasource"]["type"] == kind]


# What Grafana replaces -----------------------------------------------------------------------


def prometheus_query(expression: str, instance: str = ".*") -> str:
    """Replace the variables of a PromQL expression, as Grafana's Prometheus data source does.

    ``$__rate_interval`` is at least four scrapes; more here, so that a busy machine leaves no gap.
    ``$__range`` is the time the dashboard shows. ``$instance`` is the dashboard's own variable:
    ``.*`` for "All" (its ``allValue``), or an address with its regular expression escaped.
    """
    values = {"$__rate_interval": "10s", "$__range": "60s", "$instance": instance}
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, f"a variable that is not known: {expression}"
    return expression


# What is chosen of the variables of *Readings*; Grafana doubles the quotes in a value.
CHOSEN = {
    "${topic:sqlstring}": "'iot/device-0','iot/device-1','iot/it''s gone'",
    "${name:sqlstring}": "'temperature'",
    "$silent_after": "3 seconds",
    "${level:sqlstring}": "'(any)'",
    "${level_value:sqlstring}": "''",
}


def sql_query(sql: str, start: datetime, end: datetime, interval: int = 60) -> str:
    """Replace the variables and macros of a query, as Grafana's PostgreSQL data source does.

    ``$__interval`` (seconds between two points) is replaced first, then the macros; like
    Grafana's, these take no parentheses in their arguments. The third argument of ``$__timeGroup``
    says what Grafana fills gaps with and does not reach the database.
    https://grafana.com/docs/grafana/latest/datasources/postgres/query-editor/#macros
    """
    sql = sql.replace("$__interval_ms", str(interval * 1000)).replace("$__interval", f"{interval}s")
    for name, value in CHOSEN.items():
        sql = sql.replace(name, value)

    def macro(found: re.Match[str]) -> str:
        name, arguments = found[1], [part.strip() for part in found[2].split(",")]
        column = arguments[0]
        if name == "timeFilter":
            return f"{column} BETWEEN '{start.isoformat()}' AND '{end.isoformat()}'"
        if name == "timeGroup":
            seconds = int(arguments[1].strip("'").removesuffix("s"))
            return f"floor(extract(epoch from {column})/{seconds})*{seconds}"
        raise AssertionError(f"a macro that is not known: {name}")

    sql = re.sub(r"\$__(\w+)\(([^)]*)\)", macro, sql)
    assert "$" not in sql, f"a variable that is not known: {sql}"
    return sql


# Real services -------------------------------------------------------------------------------


@dataclass
class Installation:
    """What the dashboards show, and from when to when there was traffic."""

    prometheus: Prometheus
    reader: Database
    messages: int
    start: datetime
    end: datetime


@pytest.fixture(scope="module")
def installation(
    _initialised: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """Traffic for some seconds: messages on twelve topics, a dead letter, a database error."""
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
        publish(broker, [("iot/it's gone", b'{"temperature": 7}')])  # silent from now on
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
        eventually(lambda: prometheus.get("query", query=seen)["result"], what="it is scraped")
        yield Installation(prometheus, roles.database(READER), sent, start, datetime.now(UTC))


@pytest.mark.parametrize("target", of_kind("prometheus"))
def test_prometheus_query_returns_data(target: dict[str, Any], installation: Installation) -> None:
    prometheus = installation.prometheus
    start, end = installation.start.timestamp(), installation.end.timestamp()
    for instance in (".*", prometheus.target.replace(".", r"\\.")):
        query = prometheus_query(target["expr"], instance)
        assert prometheus.numbers(query, start, end), query


@pytest.mark.parametrize("target", of_kind("prometheus"))
def test_metrics_exist(target: dict[str, Any], installation: Installation) -> None:
    """Also in the branches of an `or` that did not count in the test above."""
    there = set(installation.prometheus.get("label/__name__/values"))
    named = set(re.findall(METRIC, target["expr"]))
    assert named
    assert named <= there


@pytest.mark.parametrize("target", of_kind("postgres"))
def test_sql_query_returns_data(target: dict[str, Any], installation: Installation) -> None:
    sql = sql_query(target["rawSql"], installation.start, installation.end)
    assert installation.reader.query(sql)


def query_of(title: str) -> str:
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
def test_last_value(title: str, expected: float, installation: Installation) -> None:
    result = installation.prometheus.get("query", query=prometheus_query(query_of(title)))
    assert [float(series["value"][1]) for series in result["result"]] == [expected]


def test_rates_add_up(installation: Installation) -> None:
    """What the graph of stored messages covers is what was stored."""
    start, end = installation.start.timestamp() - 5, installation.end.timestamp() + 15
    rates = installation.prometheus.numbers(prometheus_query(query_of("Stored")), start, end)
    assert sum(rates) == pytest.approx(installation.messages, rel=0.25)


@pytest.mark.parametrize("interval", [1, 60, 3600])
def test_messages_per_minute(interval: int, installation: Installation) -> None:
    """Ten topics and the others, and every row once, whatever the interval."""
    sql = sql_query(
        query_of("Messages per minute by topic"), installation.start, installation.end, interval
    )
    rows = installation.reader.query(sql)
    assert len({topic for _, topic, _ in rows}) == 11  # of 13
    assert "all others" in {topic for _, topic, _ in rows}
    assert sum(value for *_, value in rows) * interval / 60 == pytest.approx(installation.messages)


def test_tables(installation: Installation) -> None:
    def rows_of(title: str) -> list[Any]:
        between = (installation.start, installation.end)
        return installation.reader.query(sql_query(query_of(title), *between))

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


def test_readings_of_nothing_chosen(installation: Installation) -> None:
    """Grafana writes '' where a variable has no value."""
    sql = query_of("Latest readings").replace("${topic:sqlstring}", "''")
    assert installation.reader.query(sql_query(sql, installation.start, installation.end)) == []


def test_instances_to_choose_from(installation: Installation) -> None:
    (variable,) = DASHBOARDS["pipeline"]["templating"]["list"]
    asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert asked, variable
    metric, label = asked.groups()
    values = installation.prometheus.get(f"label/{label}/values", **{"match[]": metric})
    assert values == [installation.prometheus.target]


def choices(name: str, installation: Installation, **chosen: str) -> list[str]:
    """What there is to choose from of a variable of *Readings*."""
    (sql,) = [
        one["query"] for one in DASHBOARDS["readings"]["templating"]["list"] if one["name"] == name
    ]
    for variable, value in chosen.items():
        sql = sql.replace(f"${{{variable}:sqlstring}}", value)
    rows = installation.reader.query(sql_query(sql, installation.start, installation.end))
    return [value for (value,) in rows]


def test_topics_and_names_to_choose_from(installation: Installation) -> None:
    assert len(choices("topic", installation)) == 13
    assert choices("name", installation) == ["temperature"]


def test_topics_are_chosen_by_level(installation: Installation) -> None:
    assert choices("level", installation) == ["(any)", "device"]
    devices = choices("level_value", installation, level="'device'")
    assert len(devices) == 13
    chosen = {"level": "'device'", "level_value": "'device-3','it''s gone'"}
    assert choices("topic", installation, **chosen) == ["iot/device-3", "iot/it's gone"]


# Structure -----------------------------------------------------------------------------------


def test_files_are_current() -> None:
    written = {path.stem: path.read_text() for path in FOLDER.glob("*.json")}
    made = {uid: text(one) for uid, one in dashboards().items()}
    assert written == made, "run: .venv/bin/python tests/grafana_dashboards.py"


@pytest.fixture(params=DASHBOARDS)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = DASHBOARDS[request.param]
    return found


def test_there_are_dashboards() -> None:
    assert "pipeline" in DASHBOARDS


def test_dashboard_is_found_under_its_name(dashboard: dict[str, Any]) -> None:
    assert DASHBOARDS[dashboard["uid"]] is dashboard, "the file has the name of the uid"
    assert dashboard["title"]
    assert dashboard["description"]
    assert dashboard["timezone"] == "browser"
    assert dashboard["refresh"] in ("15s", "1m")
    assert dashboard["schemaVersion"] >= 41
    assert "id" not in dashboard, "Grafana numbers them itself"


@pytest.mark.parametrize("key", ["id", "title"])
def test_panels_can_be_told_apart(dashboard: dict[str, Any], key: str) -> None:
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
def test_panel_explains_itself(panel: dict[str, Any]) -> None:
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


@pytest.mark.parametrize("target", of_kind("prometheus"))
def test_each_query_has_a_legend(target: dict[str, Any]) -> None:
    assert target["legendFormat"]


PIPELINE = [param for param in of_kind("prometheus") if str(param.id).startswith("pipeline-")]


@pytest.mark.parametrize("target", PIPELINE)
def test_query_follows_the_choice_of_collectors(target: dict[str, Any]) -> None:
    for selector in re.findall(r"\{[^}]*\}", target["expr"]):
        assert 'instance=~"$instance"' in selector
