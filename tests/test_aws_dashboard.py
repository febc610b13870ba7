"""The AWS dashboard and rules use metrics that the exporter exports, and use all of them.

The queries run in a real Prometheus, which scrapes a stand-in for the exporter. The stand-in
exports the metrics of the role's configuration file.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from rendering import ROLES, render
from test_dashboards import DASHBOARDS

from testing.aws.cloudwatch_exporter import StandIn, metric_name, series
from testing.prometheus import Prometheus
from testing.service import eventually

RULES = (ROLES / "prometheus/files/rules/aws.yml").read_text()
CONFIG = yaml.safe_load(
    render(
        "cloudwatch_exporter/cloudwatch-exporter.yml.j2",
        aws_base_name="iot-system",
        aws_base_region="us-east-1",
        cloudwatch_exporter_replay_rules=2,
    )
)
EXPORTED = {name for name, _ in series(CONFIG)}
TARGETS = [
    pytest.param(target, id=f"{panel['title']}-{target['refId']}")
    for panel in DASHBOARDS["aws"]["panels"]
    for target in panel.get("targets", [])
]
EXPRESSIONS = [
    str(target["expr"])
    for panel in DASHBOARDS["aws"]["panels"]
    for target in panel.get("targets", [])
]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with contextlib.ExitStack() as stack:
        exporter = stack.enter_context(contextlib.closing(StandIn(CONFIG)))
        prometheus = Prometheus(tmp_path_factory.mktemp("aws"), exporter.address, "cloudwatch")
        stack.enter_context(contextlib.closing(prometheus)).start()
        # increase() needs two samples.
        twice = "count_over_time(yace_cloudwatch_requests_total[1m]) > 1"
        eventually(
            lambda: prometheus.get("query", query=twice)["result"],
            what="Prometheus has scraped the exporter twice",
        )
        yield prometheus


@pytest.mark.parametrize("target", TARGETS)
def test_aws_query_returns_data(target: dict[str, Any], prometheus: Prometheus) -> None:
    assert prometheus.numbers(target["expr"], time.time() - 10, time.time()), target["expr"]


@pytest.mark.parametrize("target", TARGETS)
def test_each_query_has_a_legend_and_needs_no_variable(target: dict[str, Any]) -> None:
    assert target["legendFormat"]
    assert "$" not in target["expr"]


def test_name_patterns_match_all_metrics_of_their_kind(prometheus: Prometheus) -> None:
    selectors = re.findall(r"{__name__=~.*?}", " ".join(EXPRESSIONS))
    found: list[set[str]] = []
    for selector in selectors:
        assert selector in RULES, "the alert uses the same pattern"
        result = prometheus.get("query", query=selector)["result"]
        found.append({one["metric"]["__name__"] for one in result})
    assert found == [
        {name for name in EXPORTED if "auth_error" in name},
        {name for name in EXPORTED if "throttle" in name},
    ]
    assert [len(names) for names in found] == [4, 6]


def test_each_exported_metric_is_shown() -> None:
    text = " ".join(EXPRESSIONS)
    assert {name for name in EXPORTED if not re.search(rf"\b{name}\b", text)} == set()


def test_metrics_of_the_rules_are_exported() -> None:
    named = set(re.findall(r"\baws_(?:iot|rds|sqs|logs)_\w+", RULES))
    named -= {name for name in named if name.endswith("_")}  # parts of regular expressions
    assert len(named) >= 6
    assert named <= EXPORTED


def test_page_lists_each_alert() -> None:
    page = (ROLES.parent / "docs/aws-metrics.md").read_text()
    alerts = re.findall(r"- alert: (\w+)", RULES)
    assert {name for name in alerts if f"`{name}`" not in page} == set()
    links = re.findall(r"\]\((?!https:)([^)#]+)", page)
    assert [link for link in links if not (ROLES.parent / "docs" / link).exists()] == []


@pytest.mark.parametrize(
    ("namespace", "metric", "statistic", "documented"),
    [  # in the exporter's README and its examples of queries
        ("AWS/EC2", "CPUUtilization", "Maximum", "aws_ec2_cpuutilization_maximum"),
        ("AWS/ES", "FreeStorageSpace", "Sum", "aws_es_free_storage_space_sum"),
        ("AWS/ELB", "HTTPCode_Backend_4XX", "Sum", "aws_elb_httpcode_backend_4_xx_sum"),
        ("AWS/IoT", "Connect.ClientIDThrottle", "Sum", "aws_iot_connect_client_idthrottle_sum"),
    ],
)
def test_stand_in_names_metrics_as_documented(
    namespace: str, metric: str, statistic: str, documented: str
) -> None:
    assert metric_name(namespace, metric, statistic) == documented


@pytest.mark.parametrize("late", [0, 60, 90, 120])  # seconds from a minute's end to its value
@pytest.mark.parametrize("second", [0, 1, 30, 59])  # of the minute in which the rounds begin
def test_no_minute_is_missing_between_two_rounds(late: int, second: int) -> None:
    """How the exporter queries a static job, and how CloudWatch responds.

    `validateMetric` in the exporter's pkg/config/scrapeconf.go (0.67.0) discards ``delay`` and
    refuses a length below the period. The request ends now. CloudWatch rounds its start down to the
    minute, and the periods begin there (API reference of GetMetricStatistics). From the response,
    `getDataPoints` takes the newest period that has a value.
    """
    metrics = [metric for job in CONFIG["static"] for metric in job["metrics"]]
    windows = {metric["name"]: (metric["period"], metric["length"]) for metric in metrics}
    assert windows.pop("CPUCreditBalance") == (900, 900)  # a value every five minutes
    (window,) = set(windows.values())
    assert all(len(metric["statistics"]) == 1 and "delay" not in metric for metric in metrics)
    period, length = window
    assert length >= period
    counted: list[int] = []  # the minutes in the value of each round
    for now in range(7200 + second, 10_800 + second, 300):
        start = (now - length) // 60 * 60
        there = [m for m in range(start, now, 60) if m + 60 + late <= now]
        newest = max((m - start) // period for m in there)
        value = [m for m in there if (m - start) // period == newest]
        assert 5 <= len(value) <= 7
        counted += value
    assert set(counted) == set(range(min(counted), max(counted) + 60, 60))
