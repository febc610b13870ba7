#!/usr/bin/env python3
"""A stand-in for Grafana in tests, where Grafana is not installed. It shows no dashboards.

It takes Grafana's arguments, fails unless it can read every file that the configuration names, and
answers /api/health on the configured port.
"""

from __future__ import annotations

import argparse
import configparser
import http.server
import json
import re
from pathlib import Path


def expand(text: str) -> str:
    """Replace ``$__file{path}`` with the content of the file, like Grafana."""
    return re.sub(r"\$__file\{([^}]+)\}", lambda found: Path(found[1]).read_text().strip(), text)


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"version": "stand-in"}).encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["server"])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--homepath", type=Path, required=True)
    arguments = parser.parse_args()
    (arguments.homepath / "conf/defaults.ini").read_text()

    ini = configparser.RawConfigParser(delimiters="=")
    ini.read_string(expand(arguments.config.read_text()))
    if not ini["security"]["admin_password"] or not ini["security"]["secret_key"]:
        raise SystemExit("a secret is empty")

    provisioning = Path(ini["paths"]["provisioning"])
    expand((provisioning / "datasources/iot-system.yml").read_text())
    provider = (provisioning / "dashboards/iot-system.yml").read_text()
    path = re.search(r"path: (.+)", provider)
    if not path:
        raise SystemExit("no path of dashboards")
    dashboards = Path(path[1])
    json.loads((dashboards / "pipeline.json").read_text())
    (Path(ini["paths"]["data"]) / "grafana.db").touch()

    server = ini["server"]
    address = (server["http_addr"], int(server["http_port"]))
    http.server.ThreadingHTTPServer(address, Health).serve_forever()


if __name__ == "__main__":
    main()
