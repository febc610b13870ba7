#!/usr/bin/env python3
"""A stand-in for the commands of minikube, docker and kubectl that roles/minikube calls.

It starts nothing. It only keeps its state in the file state.json of the directory
$MINIKUBE_STANDIN. Its output has the formats of minikube 1.38, taken from the source code of
kubernetes/minikube and not recorded from a running minikube:

- `profile list -o json`: cmd/minikube/cmd/config/profile_list.go, pkg/minikube/config/types.go; an
  example of the real output is in its pull request 9996.
- `status -o json` and its exit code (1 host + 2 cluster + 4 kubeconfig), and `null` with exit code
  0 for a node whose container is gone: cmd/minikube/cmd/status.go, pkg/minikube/cluster/status.go.
- `addons list -o json`: cmd/minikube/cmd/config/addons_list.go.
- `image ls`: ListImages in pkg/minikube/machine/cache_images.go; one name per line; a stopped
  cluster lists nothing and succeeds. Short names are prefixed with a registry host and /library/:
  pull request 16214.
- `image build` succeeds when the build fails: issues 12556 and 16576, BuildImage in
  pkg/minikube/machine/build_images.go.
- `start` and `delete`: exit codes from pkg/minikube/reason/exitcodes.go; texts from issues.

Not verified against a real minikube: what `start --wait=all` waits for, how long commands take, and
the exact text of a failed start or build. The CI job `kubernetes` runs the real minikube.

calls.log has a line for each call. state.json contains, besides `profiles` and `images`: `docker`,
which is up, down or denied, and `fails`, the commands that fail (start, build).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

Object = dict[str, Any]

HOME = Path(os.environ["MINIKUBE_STANDIN"])
STATE = HOME / "state.json"
FRESH: Object = {"docker": "up", "version": "v1.38.1", "profiles": {}, "invalid": [], "images": []}
ADDONS = ["default-storageclass", "ingress", "metrics-server", "storage-provisioner"]
APISERVER_MISSING = 105
GUEST_NOT_FOUND = 85


def fail(text: str, code: int) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(code)


def options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split options from words: ({"profile": "x", "force": ""}, ["image", "ls"])."""
    flags = [a[2:].partition("=") for a in arguments if a.startswith("--")]
    return {name: value for name, _, value in flags}, [
        a for a in arguments if not a.startswith("--")
    ]


def kubectl(_state: Object, _arguments: list[str]) -> None:
    print("Client Version: v1.35.1")


def docker(state: Object, arguments: list[str]) -> None:
    assert arguments[:2] == ["info", "--format"], arguments
    if state["docker"] == "up":
        info = {"NCPU": 4, "MemTotal": 16 << 30, "DockerRootDir": "/", **state.get("info", {})}
        print(json.dumps(info))
        return
    # The docker client also prints an empty answer on stdout.
    print("null")
    fail(
        {
            "down": "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. "
            "Is the docker daemon running?",
            "denied": "permission denied while trying to connect to the Docker daemon socket at "
            "unix:///var/run/docker.sock",
        }[state["docker"]],
        1,
    )


def status(profile: Object) -> tuple[Object | None, int]:
    """Return the output of `status -o json` and its exit code."""
    if profile["host"] == "Nonexistent":
        return None, 0
    running = profile["host"] == "Running"
    node = {
        "Name": profile["config"]["Name"],
        "Host": profile["host"],
        "Kubelet": profile["host"],
        "APIServer": profile["host"],
        "Kubeconfig": "Configured" if running else profile["host"],
        "Worker": False,
    }
    return node, 0 if running else 7


def profile_list(state: Object) -> Object:
    valid = [
        {"Name": name, "Status": p["host"], "Config": p["config"], "Active": False}
        for name, p in state["profiles"].items()
    ]
    invalid = [{"Name": name, "Status": "", "Config": None} for name in state["invalid"]]
    return {"invalid": invalid, "valid": valid}


def start(state: Object, name: str, flags: dict[str, str]) -> None:
    if os.geteuid() == 0 and "force" not in flags:
        fail(
            '* The "docker" driver should not be used with root privileges. If you wish to '
            "continue as root, use --force.\n\n"
            'X Exiting due to DRV_AS_ROOT: The "docker" driver should not be used with root '
            "privileges.",
            57,
        )
    print(f"* [{name}] minikube {state['version']} on Debian 12")
    if name not in state["profiles"]:
        config = {
            "Name": name,
            "Driver": flags["driver"],
            "CPUs": int(flags["cpus"]),
            "Memory": int(flags["memory"].removesuffix("mb")),
            "KubernetesConfig": {
                "KubernetesVersion": flags["kubernetes-version"],
                "ContainerRuntime": flags["container-runtime"],
                "CNI": flags["cni"],
            },
            "Addons": {"default-storageclass": True, "storage-provisioner": True},
        }
        state["profiles"][name] = {"host": "Stopped", "config": config}
    elif "kubernetes-version" in flags:
        # The version is the only option that changes an existing cluster.
        kubernetes = state["profiles"][name]["config"]["KubernetesConfig"]
        kubernetes["KubernetesVersion"] = flags["kubernetes-version"]
    if "start" in state.get("fails", []):
        STATE.write_text(json.dumps(state))
        fail(
            "X Exiting due to K8S_APISERVER_MISSING: wait 6m0s for node: wait for apiserver proc: "
            "apiserver process never appeared\n"
            "* Suggestion: Check that the provided apiserver flags are valid, and that SELinux is "
            "disabled",
            APISERVER_MISSING,
        )
    state["profiles"][name]["host"] = "Running"
    print(f"* Done! To connect to this cluster, use: --context={name}")


def build(state: Object, flags: dict[str, str], context: str) -> None:
    dockerfile = Path(context) / flags["file"]
    if not dockerfile.is_file() or "build" in state.get("fails", []):
        fail('#5 ERROR: process "/bin/sh -c false" did not complete successfully: exit code: 1', 0)
    name = flags["tag"]
    state["images"].append(name if "/" in name else f"registry.example/library/{name}")


def minikube(state: Object, arguments: list[str]) -> None:
    flags, words = options(arguments)
    name = flags.get("profile", "minikube")
    profile = state["profiles"].get(name)
    if words not in (["version"], ["profile", "list"], ["start"], ["delete"]) and not profile:
        fail(f'* Profile "{name}" not found. Run "minikube profile list"', GUEST_NOT_FOUND)
    match words:
        case ["version"]:
            print(state["version"])
        case ["profile", "list"]:
            print(json.dumps(profile_list(state)), end="")
        case ["status"]:
            node, code = status(profile)
            print(json.dumps(node), end="")
            sys.exit(code)
        case ["start"]:
            start(state, name, flags)
        case ["addons", "list"]:
            on = profile["config"]["Addons"]
            print(
                json.dumps(
                    {
                        addon: {
                            "Profile": name,
                            "Status": "enabled" if on.get(addon) else "disabled",
                        }
                        for addon in ADDONS
                    }
                )
            )
        case ["addons", "enable", addon]:
            profile["config"]["Addons"][addon] = True
        case ["image", "ls"]:
            print("\n".join(state["images"] if profile["host"] == "Running" else []))
        case ["image", "build", context]:
            build(state, flags, context)
        case ["delete"]:
            state["profiles"].pop(name, None)
            state["invalid"] = [other for other in state["invalid"] if other != name]
            state["images"] = []
            print(f'* Removed all traces of the "{name}" cluster.')
        case _:
            fail(f"the stand-in does not know minikube {' '.join(arguments)}", 14)


def main() -> None:
    program = Path(sys.argv[0]).name
    with (HOME / "calls.log").open("a") as log:
        log.write(" ".join([program, *sys.argv[1:]]) + "\n")
    state = FRESH | (json.loads(STATE.read_text()) if STATE.exists() else {})
    {"minikube": minikube, "docker": docker, "kubectl": kubectl}[program](state, sys.argv[1:])
    STATE.write_text(json.dumps(state))


if __name__ == "__main__":
    main()
