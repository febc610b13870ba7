"""The command: `python -m testing.kubernetes_api --kubeconfig FILE`."""

import argparse
import os
import socket
from pathlib import Path

import waitress
import yaml

from .server import Server


def main() -> None:
    options = _options()
    server = Server()
    listener = socket.create_server(("127.0.0.1", options.port))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    # It listens from here on, so whoever finds the files, or sees the parent end, can connect.
    if options.detach and (child := os.fork()):
        _write(options, url, child)
        return
    if options.detach:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
    else:
        _write(options, url, os.getpid())
    # Ends on SIGTERM as Python does by default: there is nothing to save.
    waitress.serve(server, sockets=[listener], threads=4, _quiet=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("kubernetes_api", description="Stand-in for a Kubernetes API")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.add_argument("--kubeconfig", type=Path, required=True, help="file to write")
    parser.add_argument("--pidfile", type=Path, help="file to write")
    parser.add_argument("--detach", action="store_true", help="serve in the background")
    return parser.parse_args()


def _write(options: argparse.Namespace, url: str, pid: int) -> None:
    """Write the files, complete from the moment they are there, and say where it listens."""
    name = "stand-in"
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "clusters": [{"name": name, "cluster": {"server": url}}],
        "users": [{"name": name, "user": {}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
    }
    files = {options.kubeconfig: yaml.safe_dump(kubeconfig), options.pidfile: f"{pid}\n"}
    for path, text in files.items():
        if path:
            draft = path.with_name(f"{path.name}.new")
            draft.write_text(text)
            draft.replace(path)
    print(url, flush=True)


if __name__ == "__main__":
    main()
