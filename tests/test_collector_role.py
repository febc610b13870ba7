"""The role ``collector``: the extras that it installs and the settings that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_runs import ROOT, playbook, preflight_outcomes

PLAY = """
- hosts: host
  gather_facts: true
  gather_subset: ["!all", min]
  roles: # for their variables
    - {role: iot.platform.mosquitto, tags: never}
    - {role: iot.platform.postgres, tags: never}
    - {role: iot.platform.collector, tags: never}
  tasks:
    - ansible.builtin.copy:
        content: >-
          {{ {'extras': __collector_extras, 'settings': __collector_settings,
              'command': lookup('ansible.builtin.template', command),
              'marker': __collector_wanted | replace(__collector_checksum, 'checksum')} | to_json }}
        dest: "{{ to }}"
        mode: "0644"
      vars:
        __collector_checksum: abc
"""
ENDPOINT = "awsiot://abc-ats.iot.eu-west-1.amazonaws.com"


@pytest.mark.parametrize(
    "variables",
    [
        {"collector_mqtt_url": ENDPOINT, "mosquitto_allow_anonymous": False},
        {"collector_environment": {"IOT_MQTT_URL": ENDPOINT, "IOT_MQTT_MAX_INFLIGHT": 100}},
    ],
)
def test_iot_core_needs_the_aws_extra_and_no_mqtt_user(
    tmp_path: Path, variables: dict[str, object]
) -> None:
    found = settings(tmp_path, variables)
    assert (found["extras"], found["marker"]) == ("[aws]", "checksum[aws]")
    assert found["settings"]["IOT_MQTT_URL"] == ENDPOINT
    assert int(found["settings"]["IOT_MQTT_MAX_INFLIGHT"]) == 100
    assert "IOT_MQTT_USERNAME" not in found["settings"]
    assert "IOT_BROKER_METRICS" not in found["settings"]


def test_mosquitto_needs_no_extra(tmp_path: Path) -> None:
    found = settings(tmp_path, {"mosquitto_allow_anonymous": False})
    assert (found["extras"], found["marker"]) == ("", "checksum")
    assert int(found["settings"]["IOT_MQTT_MAX_INFLIGHT"]) == 10_000
    assert found["settings"]["IOT_MQTT_USERNAME"] == "iot-collector"
    assert found["settings"]["IOT_BROKER_METRICS"] == "true"


def test_archive_target_needs_the_archive_extra(tmp_path: Path) -> None:
    found = settings(tmp_path, {"collector_archive_target": "/archive"})
    assert (found["extras"], found["marker"]) == ("[archive]", "checksum[archive]")
    assert found["settings"]["IOT_ARCHIVE_TARGET"] == "/archive"


def test_lists_are_joined_with_commas(tmp_path: Path) -> None:
    found = settings(
        tmp_path,
        {
            "collector_topic_templates": ["plant/{site}/{device}", "+/{device}/#"],
            "collector_device_time_keys": ["time:iso8601"],
            "collector_cbor_topics": ["a/+", "b/#"],
        },
    )["settings"]
    assert found["IOT_TOPIC_TEMPLATES"] == "plant/{site}/{device},+/{device}/#"
    assert found["IOT_DEVICE_TIME_KEYS"] == "time:iso8601"
    assert found["IOT_CBOR_TOPICS"] == "a/+,b/#"
    assert "IOT_MESSAGEPACK_TOPICS" not in found


def test_verify_reads_as_the_role_that_may_only_read(tmp_path: Path) -> None:
    command = settings(tmp_path, {"postgres_reader": "only_reads"})["command"]
    assert "IOT_DATABASE_URL=postgresql://only_reads@127.0.0.1:5432/iot" in command


def settings(folder: Path, variables: dict[str, object]) -> dict[str, Any]:
    play, found = folder / "play.yml", folder / "found"
    play.write_text(PLAY)
    done = playbook(
        str(play),
        f"-e{json.dumps({'collector_archive_target': '', **variables, 'to': str(found)})}",
        f"-ecommand={ROOT / 'roles/collector/templates/iot-collector.j2'}",
        "--skip-tags=never",
    )
    assert done.returncode == 0, done.stdout
    read: dict[str, Any] = json.loads(found.read_text())
    return read


MQTT, DATABASE = "mqtts://broker.example:8883", "postgresql://db.example:5432/iot"
# Variables, and the setting that preflight names; None if it accepts them.
PASSWORDS: list[tuple[dict[str, Any], str | None]] = [
    ({"collector_mqtt_url": MQTT, "collector_database_url": DATABASE}, None),
    ({"collector_database_url": "host=/run/postgresql dbname=iot user=a@b:c"}, None),
    (
        {"collector_environment": {"IOT_MQTT_PASSWORD_FILE": "/etc/p", "IOT_MQTT_PASSWORD": ""}},
        None,
    ),
    ({"collector_environment": {"IOT_MQTT_PASSWORD": "hidden"}}, "IOT_MQTT_PASSWORD"),
    ({"collector_mqtt_url": "mqtts://me:hidden@broker.example"}, "IOT_MQTT_URL"),
    ({"collector_mqtt_url": "mqtts://:hid%2Fden@broker.example"}, "IOT_MQTT_URL"),
    ({"collector_database_url": "host=db password=hidden"}, "IOT_DATABASE_URL"),
    ({"collector_database_url": f"{DATABASE}?password=hidden"}, "IOT_DATABASE_URL"),
]


def test_preflight_refuses_settings_with_a_password(tmp_path: Path) -> None:
    outcomes, output = preflight_outcomes(
        "collector",
        [variables for variables, _ in PASSWORDS],
        tmp_path,
        *("-ecollector_http_port=1", "-ecollector_bind_address=127.0.0.9"),
    )
    for outcome, (_, name) in zip(outcomes, PASSWORDS, strict=True):
        assert outcome.startswith(f"{name} would show a password" if name else "accepted"), outcome
    assert "hidden" not in output
