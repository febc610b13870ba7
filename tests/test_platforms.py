"""The platforms have the same configuration files, except for addresses and paths."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from ansible_runs import playbook

# Patterns that may differ, with their replacement before the comparison.
DIFFERENCES = [
    (r"(?<![\w.])/(?:[\w.-]+/)*[\w.*-]*", "PATH"),
    (r"\b(?:127\.0\.0\.1|0\.0\.0\.0|localhost|[a-z]+-service)\b", "ADDRESS"),
    (
        r"(?m)^http_port = (?:3000|3001)$",
        "http_port = PORT",
    ),  # on one machine, the collector has port 3000
]
FILES = [
    "accounts",
    "acl",
    "alertmanager.yml",
    "dashboards.yml",
    "datasources.yml",
    "grafana.ini",
    "mosquitto.conf",
    "pg_hba.conf",
    "postgresql.conf",
    "prometheus.yml",
    "roles.sql",
]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories with the rendered files, by inventory group."""
    folders = {}
    for target in ("host", "local"):
        folders[target] = tmp_path_factory.mktemp(target)
        # The roles have the tag "never", because only their variables are needed.
        done = playbook(
            "tests/render.yml",
            f"-etarget={target}",
            f"-erender_to={folders[target]}",
            "--skip-tags=never",
        )
        assert done.returncode == 0, done.stdout
    return folders


def comparable(text: str) -> str:
    for pattern, replacement in DIFFERENCES:
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.parametrize("name", FILES)
def test_files_differ_only_in_addresses_and_paths(rendered: dict[str, Path], name: str) -> None:
    texts = {target: (folder / name).read_text() for target, folder in rendered.items()}
    if name == "prometheus.yml":
        for target, text in texts.items():
            document = yaml.safe_load(text)
            jobs = {job["job_name"]: job for job in document["scrape_configs"]}
            # The collector has a fixed address on the host, and is discovered on Kubernetes.
            for key in ("static_configs", "kubernetes_sd_configs", "relabel_configs"):
                jobs["collector"].pop(key, None)
            # Only the host platform has the exporters of PostgreSQL and of the machine.
            exporters = [jobs[name] for name in ("postgres", "node") if name in jobs]
            assert len(exporters) == (2 if target == "host" else 0)
            document["scrape_configs"] = [
                job for job in document["scrape_configs"] if job not in exporters
            ]
            texts[target] = yaml.safe_dump(document)
    assert comparable(texts["host"]) == comparable(texts["local"])


def promtool_accepts(file: Path) -> None:
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_alerts_are_sent_to_the_alertmanager(rendered: dict[str, Path]) -> None:
    promtool_accepts(
        rendered["host"] / "prometheus.yml"
    )  # Debian's promtool does not support Kubernetes
    for target, address in [("host", "127.0.0.1:9093"), ("local", "alertmanager-service:9093")]:
        document = yaml.safe_load((rendered[target] / "prometheus.yml").read_text())
        (alertmanager,) = document["alerting"]["alertmanagers"]
        assert alertmanager == {"static_configs": [{"targets": [address]}]}


def test_comparison_finds_changed_settings(rendered: dict[str, Path]) -> None:
    text = (rendered["local"] / "mosquitto.conf").read_text()
    for setting in ("max_queued_messages 1000000", "listener 1883", "allow_anonymous false"):
        assert setting in text
        assert comparable(text.replace(setting, f"{setting}0")) != comparable(text)
