"""Clients connect to the addresses on which the programs listen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible_runs import playbook

PLAY = """
- hosts: host
  gather_facts: true
  gather_subset: ["!all", min]
  roles: # for their variables
    - {role: iot.platform.mosquitto, tags: never}
    - {role: iot.platform.postgres, tags: never}
    - {role: iot.platform.collector, tags: never}
    - {role: iot.platform.prometheus, tags: never}
  tasks:
    - ansible.builtin.copy:
        content: >-
          {{ [mosquitto_bind_address | iot.platform.connect_address,
              __collector_settings.IOT_MQTT_URL, __collector_settings.IOT_DATABASE_URL,
              __collector_url, __prometheus_url] | to_json }}
        dest: "{{ to }}"
        mode: "0644"
"""


@pytest.mark.parametrize(
    ("broker", "others", "expected"),
    [
        ("127.0.0.2", "127.0.0.1", ("127.0.0.2", "127.0.0.2", "127.0.0.1")),
        ("0.0.0.0", "127.0.0.3", ("127.0.0.1", "127.0.0.1", "127.0.0.3")),
        ("192.0.2.7", "0.0.0.0", ("192.0.2.7", "192.0.2.7", "127.0.0.1")),
        ("::", "::1", ("::1", "[::1]", "[::1]")),
        ("localhost", "::", ("localhost", "localhost", "[::1]")),
    ],
)
def test_clients_connect_to_the_listen_address(
    tmp_path: Path, broker: str, others: str, expected: tuple[str, str, str]
) -> None:
    play, found = tmp_path / "play.yml", tmp_path / "found"
    play.write_text(PLAY)
    variables = {"mosquitto_bind_address": broker, "iot_bind_address": others, "to": str(found)}
    done = playbook(str(play), f"-e{json.dumps(variables)}", "--skip-tags=never")
    assert done.returncode == 0, done.stdout
    address, broker_host, host = expected
    assert json.loads(found.read_text()) == [
        address,
        f"mqtt://{broker_host}:1883",
        f"postgresql://iot_collector@{host}:5432/iot",
        f"http://{host}:3000",
        f"http://{host}:9090",
    ]
