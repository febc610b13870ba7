#!/usr/bin/env python3
"""Show the programs, their addresses and the message counts.

The exit code is 1 unless every program runs and the collector reports "ok".
"""

from __future__ import annotations

import argparse
import configparser
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from replaced_files import replaced_files

STATE = Path(__file__).resolve().parent.parent
# The server ends the query before `run` ends psql; otherwise it would go on without psql.
COUNT = "SET statement_timeout = '8s'; SELECT count(*) FROM messages"
START = "`ansible-playbook playbooks/host.yml` (`make up`)"


def run(*command: str) -> str:
    """Standard output of a command, empty if it fails or takes too long."""
    try:
        done = subprocess.run(  # noqa: S603 -- our own two commands
            command, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def programs() -> list[tuple[int, str, str]]:
    """(priority, name, URL) of every program that the supervisor is configured to run."""
    found = []
    for path in (STATE / "etc/supervisor.d").glob("*.ini"):
        ini = configparser.RawConfigParser(inline_comment_prefixes=None)
        ini.read(path, encoding="utf-8")
        program = ini[f"program:{path.stem}"]
        found.append((int(program["priority"]), path.stem, ini[f"status:{path.stem}"]["url"]))
    return sorted(found)


def states() -> dict[str, tuple[str, list[str]]]:
    """State of each program in the supervisor, and the replaced files that it still runs from."""
    ctl = str(STATE / "venv/bin/supervisorctl")
    found = {}
    for line in run(ctl, "-c", str(STATE / "etc/supervisord.conf"), "status").splitlines():
        fields = line.split(None, 2)
        if len(fields) > 1 and fields[1].isupper():
            pid = re.match(r"pid (\d+)", fields[2]) if len(fields) > 2 else None
            found[fields[0]] = fields[1].lower(), replaced_files(int(pid[1])) if pid else []
    return found


def read_report(answer: IO[bytes]) -> dict[str, Any]:
    report: dict[str, Any] = json.load(answer)
    return report


def health(url: str) -> dict[str, Any]:
    """The collector's health report. Both a 200 and a 503 response contain it."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:  # noqa: S310 -- ours
            return read_report(answer)
    except urllib.error.HTTPError as error:
        try:
            return read_report(error)
        except ValueError:
            return {}
    except (OSError, ValueError):
        return {}


@dataclass
class Status:
    """The state of the system at one moment."""

    services: dict[str, dict[str, Any]]
    report: dict[str, Any]  # the collector's
    stored: str  # the number of rows; empty if the database does not answer

    @property
    def running(self) -> bool:
        return all(service["state"] == "running" for service in self.services.values())

    @property
    def well(self) -> bool:
        return self.running and ("collector" not in self.services or self.answer == "ok")

    @property
    def answer(self) -> str:
        return str(self.report.get("status", "does not answer"))


def look(known: list[tuple[int, str, str]]) -> Status:
    """Ask the supervisor, the collector and the database."""
    state = states()
    services: dict[str, dict[str, Any]] = {}
    for _, name, url in known:
        now, replaced = state.get(name, ("stopped", []))
        services[name] = {
            "state": now,
            "url": url,
            "log": f"{STATE}/log/{name}.log",
            "replaced_files": replaced,
        }
    return Status(
        services,
        health(services["collector"]["url"]) if "collector" in services else {},
        run(str(STATE / "bin/psql"), "-qAtc", COUNT),
    )


def show(status: Status) -> None:
    """Print the table of programs, the collector's problems and the message counts."""
    rows = [("SERVICE", "STATE", "ADDRESS", "LOG")]
    rows += [(name, s["state"], s["url"], s["log"]) for name, s in status.services.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        print("  ".join([*cells, row[3]]))

    replaced = {name: s["replaced_files"] for name, s in status.services.items()}
    if any(replaced.values()):
        print(f"\nUpgraded since they were started; {START} restarts them:")
        for name, files in replaced.items():
            if files:
                print(f"  {name} runs from the old {', '.join(files)}")

    print(f"\ncollector  {status.answer}")
    for problem in status.report.get("problems", []):
        print(f"           {problem}")
    if "accounting" in status.report:
        print(
            "messages   {received} received since it started = {inserted} stored"
            " + {duplicates} duplicates + {dead_letters} dead letters"
            " + {in_flight} in flight".format(**status.report["accounting"])
        )
    if status.stored:
        print(f"table      {status.stored} messages stored in all")


def show_next(status: Status) -> None:
    """Print commands to try."""
    services = status.services
    if not status.running:
        print(
            f"\nNext: {START} starts the programs that do not run; their logs say why they stopped."
        )
    elif not status.well:
        print(f"\nNext: see the reasons above and {services['collector']['log']}.")
    else:
        host, _, port = services["mosquitto"]["url"].rpartition("/")[2].rpartition(":")
        columns = "received_at, topic, convert_from(payload, 'UTF8') AS payload, fields"
        query = f"SELECT {columns} FROM messages ORDER BY received_at DESC LIMIT 1"  # noqa: S608 -- shown, not run
        print("\nNext, publish a message and read it back from the table:")
        print(f"  mosquitto_pub -h {host.strip('[]')} -p {port} -q 1 -t iot/data -m temperature:23")
        print(f'  {STATE}/bin/psql -c "{query}"')
        if "grafana" in services:
            print(f"Dashboards: user admin, password in {STATE}/secrets/grafana_admin_password")
        print(
            f"\nOn this machine, {STATE}/bin/iot-status shows this again (make status),\n"
            f"and {STATE}/bin/iot-collector simulate sends messages (make simulate).\n"
            "Where Ansible runs, playbooks/verify.yml follows one message (make verify),\n"
            "and playbooks/teardown.yml stops everything and keeps the data (make down)."
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--next", action="store_true", help="add commands to try")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--wait",
        type=float,
        default=0,
        metavar="SECONDS",
        help="wait up to SECONDS until everything works",
    )
    parser.add_argument(
        "--messages", action="store_true", help="also fail if no message is in the table"
    )
    arguments = parser.parse_args()

    known = programs()
    if not known:
        print(f"Nothing is installed in {STATE}. {START} installs and starts everything.")
        return 1

    until = time.monotonic() + arguments.wait
    while True:
        status = look(known)
        missing = arguments.messages and status.stored in ("", "0")
        if (status.well and not missing) or time.monotonic() > until:
            break
        time.sleep(0.5)

    if arguments.json:
        report = {
            "services": status.services,
            "accounting": status.report.get("accounting", {}),
            "problems": status.report.get("problems", []),
            "stored": int(status.stored) if status.stored else None,
        }
        json.dump(report, sys.stdout, indent=2)
    else:
        show(status)
        if missing:
            print(
                "\nNo message is in the table."
                if status.stored
                else "\nThe table of messages cannot be read."
            )
        if arguments.next:
            show_next(status)
    return 0 if status.well and not missing else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `iot-status | head` is not an error
    sys.exit(main())
