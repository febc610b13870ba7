"""Alerts of Prometheus reach a webhook and a mail server through Alertmanager."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Message
from ansible_runs import ROOT, playbook
from rendering import render

from testing.alertmanager import Alertmanager
from testing.prometheus import Prometheus
from testing.service import HOST, eventually, free_port

RULES = ROOT / "roles/prometheus/files/rules/pipeline.yml"
NO_RECEIVER: dict[str, Any] = {
    "alertmanager_webhook_url": "",
    "alertmanager_email_to": [],
    "alertmanager_email_from": "",
    "alertmanager_email_smarthost": "",
    "alertmanager_email_username": "",
    "alertmanager_email_password": "",
    "alertmanager_email_require_tls": True,
    "alertmanager_repeat_interval": "4h",
}
E_MAIL: dict[str, Any] = {
    "alertmanager_email_to": ["ops@example.org", "night@example.org"],
    "alertmanager_email_from": "alerts@example.org",
    "alertmanager_email_smarthost": "mail.example:587",
}


def configuration(**settings: object) -> dict[str, Any]:
    """Return alertmanager.yml as the role writes it."""
    text = render("alertmanager/alertmanager.yml.j2", **NO_RECEIVER | settings)
    document: dict[str, Any] = yaml.safe_load(text)
    return document


class Webhook(HTTPServer):
    """Records the notifications that are posted to it."""

    def __init__(self) -> None:
        super().__init__((HOST, 0), _Handler)
        self.received: list[tuple[str, str]] = []  # status and name of each alert


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received += [(a["status"], a["labels"]["alertname"]) for a in body["alerts"]]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Collector(HTTPServer):
    """The scrape target of Prometheus, while it runs."""

    def __init__(self, port: int) -> None:
        super().__init__((HOST, port), _Metrics)


class _Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"mqtt_connected 1\n")

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class MailServer(Message):
    """Records the recipients and subjects of received e-mails."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[tuple[str, str]] = []

    def handle_message(self, message: Any) -> None:
        self.received.append((message["To"], message["Subject"]))


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with Webhook() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def mail_server() -> Iterator[tuple[MailServer, int]]:
    handler, port = MailServer(), free_port()
    controller = Controller(handler, hostname=HOST, port=port)
    controller.start()
    yield handler, port
    controller.stop()


def test_firing_and_resolved_alert_reach_all_receivers(
    tmp_path: Path, webhook: Webhook, mail_server: tuple[MailServer, int]
) -> None:
    mails, smtp_port = mail_server
    receivers = E_MAIL | {
        "alertmanager_webhook_url": f"http://{HOST}:{webhook.server_port}/hooks/1",
        "alertmanager_email_smarthost": f"{HOST}:{smtp_port}",
        "alertmanager_email_require_tls": False,
    }
    config = configuration(**receivers)
    config["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    file = tmp_path / "alertmanager.yml"
    file.write_text(yaml.safe_dump(config))
    alertmanager = Alertmanager(tmp_path, file)
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        rule.pop("for", None)
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    port = free_port()
    prometheus = Prometheus(tmp_path, f"{HOST}:{port}")
    document = yaml.safe_load(prometheus.config.read_text())
    document["global"]["evaluation_interval"] = "1s"
    document["rule_files"] = [str(tmp_path / "rules.yml")]
    document["alerting"] = {
        "alertmanagers": [{"static_configs": [{"targets": [alertmanager.address]}]}]
    }
    prometheus.config.write_text(yaml.safe_dump(document))
    try:
        alertmanager.start()
        prometheus.launch()
        eventually(lambda: ("firing", "CollectorDown") in webhook.received)
        eventually(lambda: any("CollectorDown" in subject for _, subject in mails.received))
        assert {to for to, _ in mails.received} == {"ops@example.org, night@example.org"}
        with Collector(port) as collector:
            threading.Thread(target=collector.serve_forever, daemon=True).start()
            eventually(lambda: ("resolved", "CollectorDown") in webhook.received)
            eventually(lambda: any("RESOLVED" in subject for _, subject in mails.received))
            collector.shutdown()
    finally:
        prometheus.close()
        alertmanager.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"alertmanager_webhook_url": 'https://chat.example/hooks?token="x"#'},
        E_MAIL,
        E_MAIL | {"alertmanager_email_username": "me", "alertmanager_email_password": "a: '#\""},
    ],
    ids=["webhook", "e-mail", "e-mail with account"],
)
def test_configuration_is_valid(tmp_path: Path, settings: dict[str, Any]) -> None:
    file = tmp_path / "alertmanager.yml"
    file.write_text(render("alertmanager/alertmanager.yml.j2", **NO_RECEIVER | settings))
    done = subprocess.run(
        ["amtool", "check-config", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (receiver,) = yaml.safe_load(file.read_text())["receivers"]
    texts = json.dumps(receiver, ensure_ascii=False)
    for value in settings.values():
        if isinstance(value, str):
            assert json.dumps(value) in texts


def test_inhibition_names_existing_alerts_and_no_critical_targets() -> None:
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    severities = {rule["alert"]: rule["labels"]["severity"] for rule in rules if "alert" in rule}
    for rule in configuration()["inhibit_rules"]:
        for part in ("source_matchers", "target_matchers"):
            (matcher,) = rule[part]
            names = matcher.split('"')[1].split("|")
            assert {*names} <= {*severities}
            if part == "target_matchers":
                assert "critical" not in {severities[name] for name in names}


WRONG = [
    ({"alertmanager_webhook_url": "chat.example/hook"}, "alertmanager_webhook_url has to be a URL"),
    (
        E_MAIL | {"alertmanager_email_smarthost": "mail.example"},
        "alertmanager_email_smarthost has to name the mail server with its port",
    ),
    (E_MAIL | {"alertmanager_email_from": ""}, "alertmanager_email_from has to be the sender"),
    (
        E_MAIL | {"alertmanager_email_to": ["ops"]},
        "alertmanager_email_to is a list of addresses such as [ops@example.org]",
    ),
    (
        E_MAIL | {"alertmanager_email_username": "me"},
        "alertmanager_email_username is set, so alertmanager_email_password is needed",
    ),
    (
        E_MAIL | {"alertmanager_repeat_interval": "often"},
        "alertmanager_repeat_interval has to be a duration",
    ),
    ({"alertmanager_enabled": True}, "alertmanager_enabled is true, but there is no receiver"),
]


def test_wrong_settings_are_refused_by_preflight(tmp_path: Path) -> None:
    """All of them in one run, because a run takes seconds."""
    attempt = {
        "block": [
            {
                "ansible.builtin.include_role": {
                    "name": "iot.platform.alertmanager",
                    "tasks_from": "preflight",
                }
            }
        ],
        "rescue": [{"ansible.builtin.debug": {"msg": "refused: {{ ansible_failed_result.msg }}"}}],
    }
    file = tmp_path / "attempts.yml"
    file.write_text(
        yaml.safe_dump(
            [
                {
                    "hosts": "host",
                    "gather_facts": True,
                    "gather_subset": ["!all", "min"],
                    "tasks": [attempt | {"vars": settings} for settings, _ in WRONG],
                }
            ]
        )
    )
    done = playbook(str(file))
    _, *refused = " ".join(done.stdout.split()).split("refused: ")
    assert len(refused) == len(WRONG), done.stdout
    for text, (_, message) in zip(refused, WRONG, strict=True):
        assert message in text
