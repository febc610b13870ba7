"""The role ``mosquitto``: which accounts of devices its preflight refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_runs import preflight_outcomes

from testing.mosquitto import Mosquitto
from testing.service import HOST, binary

WRONG_TEXT = "cannot be used. Neither may be empty"
SAME_NAME = "two accounts have the same name"
GOOD = "p w#d=é'\"$"


def user(name: str, password: str = "secret") -> dict[str, Any]:
    return {"name": name, "password": password}


# mosquitto_users, and the error; None if preflight accepts them.
ACCOUNTS: list[tuple[list[dict[str, Any]], str | None]] = [
    ([user("a"), user("b c", GOOD), user("d#", "1")], None),
    ([user("a", "hidden:1")], f"password of a {WRONG_TEXT}"),
    ([user("a", " secret"), user("b", "secret\n")], f"password of a, b {WRONG_TEXT}"),
    ([user("a", "x\nb:y")], f"password of a {WRONG_TEXT}"),
    ([user("a", "")], f"password of a {WRONG_TEXT}"),
    ([user("a:b")], f"password of a:b {WRONG_TEXT}"),
    ([user("#a")], f"password of #a {WRONG_TEXT}"),
    ([user("a"), user("a")], SAME_NAME),
    ([user("iot-collector")], SAME_NAME),
]


def test_accounts_that_mosquitto_would_change_are_refused(tmp_path: Path) -> None:
    outcomes, output = preflight_outcomes(
        "mosquitto",
        [{"mosquitto_users": users} for users, _ in ACCOUNTS],
        tmp_path,
        *("-emosquitto_port=1", "-emosquitto_bind_address=127.0.0.9"),
    )
    for outcome, (_, error) in zip(outcomes, ACCOUNTS, strict=True):
        assert (error or "accepted") in outcome
    assert "hidden:1" not in output


@pytest.mark.parametrize(("password", "kept"), [(GOOD, True), ("se:cret", False), (" x", False)])
def test_which_passwords_mosquitto_passwd_keeps(
    make_broker: Any, tmp_path: Path, password: str, kept: bool
) -> None:
    """The reason for the checks."""
    file = tmp_path / "passwd"
    file.write_text(f"device:{password}\n")
    subprocess.run([binary("mosquitto_passwd"), "-U", file], check=True)
    broker: Mosquitto = make_broker(f"password_file {file}", anonymous=False).start()
    client = [binary("mosquitto_pub"), "-h", HOST, "-p", str(broker.port), "-u", "device"]
    done = subprocess.run([*client, "-P", password, "-t", "a", "-m", "b"], check=False)
    assert (done.returncode == 0) is kept
