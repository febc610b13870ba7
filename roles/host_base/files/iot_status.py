#!/usr/bin/env python3
"""Show what runs where and how many messages went through.

`--next` adds commands to try, `--json` is for programs. Fails unless everything runs.
"""

from __future__ import annotations

import configparser
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

STATE = Path(__file__).resolve().parent.parent


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
    """(priority, name, URL) of every program the supervisor has been told about."""
    found = []
    for path in (STATE / "etc/supervisor.d").glob("*.ini"):
        ini = configparser.RawConfigParser(inline_comment_prefixes=None)
        ini.read(path, encoding="utf-8")
        program = ini[f"program:{path.stem}"]
        found.append((program.getint("priority"), path.stem, ini[f"status:{path.stem}"]["url"]))
    return sorted(found)


def states() -> dict[str, str]:
    """State of each program as the supervisor sees it."""
    ctl = str(STATE / "venv/bin/supervisorctl")
    lines = run(ctl, "-c", str(STATE / "etc/supervisord.conf"), "status").splitlines()
    fields = [line.split(None, 2) for line in lines]
    return {f[0]: f[1].lower() for f in fields if len(f) > 1 and f[1].isupper()}


def health(url: str) -> dict:
    """The collector's own account of itself. A 503 carries it as well as a 200."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:  # noqa: S310 -- ours
            return json.load(answer)
    except urllib.error.HTTPError as error:
        try:
            return json.load(error)
        except ValueError:
            return {}
    except (OSError, ValueError):
        return {}


def main() -> int:
    known = programs()
    if not known:
        print(f"Nothing is installed in {STATE}. `make up` installs and starts everything.")
        return 1
    state = states()
    services = {
        name: {"state": state.get(name, "stopped"), "url": url, "log": f"{STATE}/log/{name}.log"}
        for _, name, url in known
    }
    report = health(services["collector"]["url"]) if "collector" in services else {}
    running = all(service["state"] == "running" for service in services.values())
    if "--json" in sys.argv[1:]:
        accounting = report.get("accounting", {})
        json.dump({"services": services, "accounting": accounting}, sys.stdout, indent=2)
        return 0 if running else 1

    rows = [("SERVICE", "STATE", "ADDRESS", "LOG")]
    rows += [(name, s["state"], s["url"], s["log"]) for name, s in services.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        print("  ".join([*cells, row[3]]))

    print(f"\ncollector  {report.get('status', 'does not answer')}")
    if "accounting" in report:
        print(
            "messages   {received} received since it started = {inserted} stored"
            " + {duplicates} duplicates + {dead_letters} dead letters"
            " + {in_flight} in flight".format(**report["accounting"])
        )
    stored = run(str(STATE / "bin/psql"), "-Atc", "SELECT count(*) FROM messages")
    if stored:
        print(f"table      {stored} messages stored in all")

    if "--next" in sys.argv[1:]:
        if running:
            host, _, port = services["mosquitto"]["url"].rpartition("/")[2].rpartition(":")
            columns = "received_at, topic, convert_from(payload, 'UTF8') AS payload, fields"
            query = f"SELECT {columns} FROM messages ORDER BY received_at DESC LIMIT 1"  # noqa: S608 -- shown, not run
            print("\nNext, publish a message and read it back from the table:")
            print(f"  mosquitto_pub -h {host} -p {port} -q 1 -t iot/data -m temperature:23")
            print(f'  {STATE}/bin/psql -c "{query}"')
            if "grafana" in services:
                print(f"Dashboards: user admin, password in {STATE}/secrets/grafana_admin_password")
            print("Also: make status, make simulate, make verify, make down, make help")
        else:
            print("\nNext: `make up` starts what does not run; the logs say why it stopped.")
    return 0 if running else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `iot-status | head` is no error
    sys.exit(main())
