"""A stand-in for the kubelet of a node: it runs pods as containers of Podman or Docker.

As in a cluster: volumes with the owners and modes that a kubelet gives them, kept from the init
containers, which run one by one, to the end of the pod, and claims beyond it; user, groups,
capabilities, seccomp, read-only root, environment, limits of CPU and memory; probes decide what
"ready" is; the end is the image's stop signal and, after the grace period, a kill.

Unlike in a cluster: all pods are in this machine's network, where the name of each Service leads to
127.0.0.1, so no NetworkPolicy has an effect. Probes are asked more often. Nothing is restarted. A
pod gets no account of the API. A field that is not known here is an error, not ignored.
"""

from __future__ import annotations

import base64
import io
import re
import socket
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .engines import LIMITS, Engine, EngineError
from .service import HOST, Service, eventually

Object = dict[str, Any]

# A volume as (path, type, mode, content or target) of what is in it, with its own root as "".
Entry = tuple[str, bytes, int, bytes]

# What a kubelet adds for fsGroup: to files that are written to, to those that are not, to folders.
GROUP_WRITES, GROUP_READS, GROUP_ENTERS = 0o660, 0o440, 0o2110

# Fields that mean nothing for containers in the network of one machine.
UNUSED = {
    "pod": {"topologySpreadConstraints", "serviceAccountName", "automountServiceAccountToken"},
    "container": {"imagePullPolicy", "ports", "startupProbe", "readinessProbe", "livenessProbe"},
}
POD = {"containers", "initContainers", "volumes", "securityContext", "enableServiceLinks"}
POD |= {"terminationGracePeriodSeconds", "restartPolicy", *UNUSED["pod"]}
POD_SECURITY = {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy"}
POD_SECURITY |= {"seccompProfile"}
CONTAINER = {"name", "image", "command", "args", "env", "envFrom", "securityContext", "resources"}
CONTAINER |= {"volumeMounts", *UNUSED["container"]}
CONTAINER_SECURITY = {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"}


def known(found: Object, names: set[str]) -> Object:
    """Return ``found`` after a check that it has no other fields than these."""
    assert found.keys() <= names, f"the kubelet of the tests does not know {found.keys() - names}"
    return found


def bytes_of(quantity: str) -> int:
    """Return a quantity of memory in bytes."""
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi)?", quantity).groups()  # type: ignore[union-attr]
    return int(number) << {None: 0, "Ki": 10, "Mi": 20, "Gi": 30}[unit]


def cpus_of(quantity: str) -> float:
    """Return a quantity of CPU in CPUs."""
    milli = quantity.removesuffix("m")
    return int(milli) / 1000 if milli != quantity else float(quantity)


class Kubelet:
    """Runs the pods of workloads.

    :param objects: the ConfigMaps, Secrets and Services that there are, besides others.
    :param images: images to run for those that the pods name.
    """

    def __init__(
        self, engine: Engine, objects: Sequence[Object], images: Mapping[str, str], folder: Path
    ) -> None:
        self.engine = engine
        self.images = images
        self.folder = folder
        self._objects = {(o["kind"], o["metadata"]["name"]): o for o in objects}
        self.hosts = [f"--add-host={n}:{HOST}" for kind, n in self._objects if kind == "Service"]
        self.prefix = f"iot-pods-test-{uuid.uuid4().hex[:8]}"
        self._claims: set[str] = set()
        self._pods: list[Pod] = []

    def data(self, kind: str, name: str) -> dict[str, bytes]:
        """Return the data of a ConfigMap or Secret."""
        found = self._objects[kind, name]
        plain = {k: v.encode() for k, v in found.get("stringData", {}).items()}
        if kind == "Secret":
            return {k: base64.b64decode(v) for k, v in found.get("data", {}).items()} | plain
        return {k: v.encode() for k, v in found.get("data", {}).items()}

    def start(self, workload: Object, ordinal: int = 0) -> Pod:
        """Start a pod of a StatefulSet or Job; its init containers have ended by then."""
        folder = self.folder / f"{len(self._pods)}"
        folder.mkdir()
        pod = Pod(self, workload, f"{workload['metadata']['name']}-{ordinal}", folder)
        self._pods.append(pod)
        pod.start()
        return pod

    def claim(self, pod: str, template: Object) -> tuple[str, bool]:
        """Return the volume for a claim of a pod, and whether it is new."""
        name = f"{self.prefix}-{template['metadata']['name']}-{pod}"
        if new := name not in self._claims:
            self.engine("volume", "create", name)
            self._claims.add(name)
        return name, new

    def logs(self) -> str:
        """The output of all containers."""
        return "".join(pod.log() for pod in self._pods)

    def close(self) -> None:
        for pod in self._pods:
            pod.close()
        if self._claims:
            self.engine("volume", "rm", "--force", *self._claims)


class Container(Service):
    """A container of a pod; the process is the engine's, which hands on its status."""

    def __init__(self, pod: Pod, spec: Object) -> None:
        self.name = spec["name"]
        super().__init__(pod.folder)
        self.pod = pod
        self.spec = known(spec, CONTAINER)
        self.id = f"{pod.id}-{self.name}"

    def command(self) -> Sequence[str]:
        spec, pod = self.spec, self.pod
        security = known(spec.get("securityContext", {}), CONTAINER_SECURITY)
        options = [f"--name={self.id}", "--network=host", *pod.kubelet.hosts, *LIMITS]
        options += [*pod.identity(), *self._limits()]
        if security.get("readOnlyRootFilesystem"):
            options += pod.kubelet.engine.read_only
        if security.get("allowPrivilegeEscalation") is False:
            options.append("--security-opt=no-new-privileges")
        for name in known(security.get("capabilities", {}), {"drop"}).get("drop", []):
            options.append(f"--cap-drop={name}")
        for name, value in self._environment().items():
            options.append(f"--env={name}={value}")
        for mount in spec.get("volumeMounts", []):
            known(mount, {"name", "mountPath", "readOnly"})
            volume, read_only = pod.volumes[mount["name"]]
            mode = "ro" if read_only or mount.get("readOnly") else "rw"
            options.append(f"--volume={volume}:{mount['mountPath']}:{mode},nocopy")
        command = spec.get("command", [])
        if command:  # an entrypoint of more than one word is an option of Podman alone
            options.append(f"--entrypoint={command[0]}")
        image = pod.kubelet.images[spec["image"]]
        arguments = [*command[1:], *spec.get("args", [])]
        return [*pod.kubelet.engine.command, "run", "--rm", *options, image, *arguments]

    def ready(self) -> bool:
        """Whether the probes succeed: at the start, and for traffic."""
        return self._probe("startupProbe") and self._probe("readinessProbe")

    def wait_ready(self) -> None:
        """Wait until the startup probe succeeds, as long as the probe allows."""
        probe = self.spec["startupProbe"]

        def ready_or_dead() -> bool:
            assert self.running, f"{self.id} ended at its start:\n{self.log()}"
            return self.ready()

        seconds = probe["periodSeconds"] * probe["failureThreshold"]
        eventually(ready_or_dead, min(seconds, 60), f"{self.id} is ready\n{self.log()}")

    def close(self) -> None:
        if self.running:
            self.pod.kubelet.engine("rm", "--force", self.id)
            self.wait()

    def _limits(self) -> Iterator[str]:
        limits = known(self.spec.get("resources", {}).get("limits", {}), {"cpu", "memory"})
        if "memory" in limits:
            memory = bytes_of(limits["memory"])
            yield from (f"--memory={memory}", f"--memory-swap={memory}")
        if "cpu" in limits:
            yield f"--cpus={cpus_of(str(limits['cpu']))}"

    def _environment(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in self.spec.get("envFrom", []):
            name = known(source, {"configMapRef"})["configMapRef"]["name"]
            data = self.pod.kubelet.data("ConfigMap", name)
            found |= {key: value.decode() for key, value in data.items()}
        for variable in self.spec.get("env", []):
            if "valueFrom" in variable:
                assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
                found[variable["name"]] = self.pod.name
            else:
                found[variable["name"]] = variable["value"]
        return found

    def _probe(self, kind: str) -> bool:
        probe = self.spec[kind]
        timeout = probe.get("timeoutSeconds", 1)
        ports = {p["name"]: p["containerPort"] for p in self.spec["ports"]}
        try:
            if "exec" in probe:
                self.pod.kubelet.engine("exec", self.id, *probe["exec"]["command"], timeout=timeout)
            elif "tcpSocket" in probe:
                address = HOST, ports[probe["tcpSocket"]["port"]]
                socket.create_connection(address, timeout).close()
            else:
                get = probe["httpGet"]
                url = f"http://{HOST}:{ports[get['port']]}{get['path']}"
                urllib.request.urlopen(url, timeout=timeout).close()
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except (EngineError, OSError):
            return False
        return True


class Pod:
    """A pod, with its containers and volumes."""

    def __init__(self, kubelet: Kubelet, workload: Object, name: str, folder: Path) -> None:
        self.kubelet = kubelet
        self.name = name
        self.folder = folder
        self.id = f"{kubelet.prefix}-{folder.name}-{name}"
        self.spec = known(workload["spec"]["template"]["spec"], POD)
        assert self.spec["enableServiceLinks"] is False, "each Service's address in its environment"
        self.security = known(self.spec["securityContext"], POD_SECURITY)
        self._claims = workload["spec"].get("volumeClaimTemplates", [])
        self.volumes: dict[str, tuple[str, bool]] = {}  # the engine's name, and whether read-only
        self._owned: list[str] = []
        self.init = [Container(self, spec) for spec in self.spec.get("initContainers", [])]
        (self.main,) = (Container(self, spec) for spec in self.spec["containers"])

    def identity(self) -> Iterator[str]:
        """Options for the user and the groups."""
        user, group = self.security["runAsUser"], self.security["runAsGroup"]
        assert self.security["runAsNonRoot"] is True
        assert user != 0, "container's runAsUser breaks non-root policy"
        # RuntimeDefault is the profile of the engine.
        assert self.security["seccompProfile"] == {"type": "RuntimeDefault"}
        yield f"--user={user}:{group}"
        if "fsGroup" in self.security:
            yield f"--group-add={self.security['fsGroup']}"

    def start(self) -> None:
        self._make_volumes()
        for container in self.init:
            status = container.launch().wait(120)
            assert status == 0, f"{container.id} ended with {status}:\n{container.log()}"
        self.main.launch()

    def stop(self) -> tuple[int, float]:
        """Stop the pod as its deletion does; return the exit status and the seconds it took."""
        grace = self.spec.get("terminationGracePeriodSeconds", 30)
        begun = time.monotonic()
        self.kubelet.engine("stop", f"--time={grace}", self.main.id, timeout=grace + 30)
        status = self.main.wait()
        seconds = time.monotonic() - begun
        self.close()
        return status, seconds

    def exec(self, *command: str) -> str:
        """Run a program in the container of the pod; return its output."""
        return self.kubelet.engine("exec", self.main.id, *command)

    def log(self) -> str:
        return "".join(container.log() for container in [*self.init, self.main])

    def close(self) -> None:
        for container in [*self.init, self.main]:
            container.close()
        if self.volumes:
            self.kubelet.engine("rm", "--force", self.id)
            self.kubelet.engine("volume", "rm", "--force", *self._owned)
            self.volumes, self._owned = {}, []

    def _make_volumes(self) -> None:
        """Make the volumes, and a container that holds them: a tmpfs lasts as long as its users."""
        contents = {}
        for claim in self._claims:
            name = claim["metadata"]["name"]
            volume, new = self.kubelet.claim(self.name, claim)
            self.volumes[name] = volume, False
            if new:  # a file system as it is made; later its root has the group already
                assert self.security.get("fsGroupChangePolicy") == "OnRootMismatch"
                contents[name] = [folder("", 0o755), folder("lost+found", 0o700)], GROUP_WRITES
        for spec in self.spec.get("volumes", []):
            name, memory = spec["name"], []
            known(spec, {"name", "configMap", "secret", "emptyDir"})
            if "emptyDir" in spec:
                contents[name] = [folder("", 0o777)], GROUP_WRITES
                memory = self._tmpfs(spec["emptyDir"])
            else:
                contents[name] = list(self._files(spec)), GROUP_READS
            self.volumes[name] = f"{self.id}-{name}", "emptyDir" not in spec
            self.kubelet.engine("volume", "create", *memory, self.volumes[name][0])
            self._owned.append(self.volumes[name][0])
        mounts = [f"--volume={v}:/volumes/{n}:rw,nocopy" for n, (v, _) in self.volumes.items()]
        options = ("--network=host", "--stop-signal=KILL", "--entrypoint=sleep", *LIMITS, *mounts)
        engine = self.kubelet.engine
        engine("run", "--detach", f"--name={self.id}", *options, engine.base, "infinity")
        archive = pack(contents, self.security.get("fsGroup"))
        unpack = ("exec", "--interactive", self.id, "tar", "-xpC", "/volumes")
        subprocess.run([*engine.command, *unpack], input=archive, check=True)

    def _tmpfs(self, spec: Object) -> list[str]:
        if known(spec, {"medium", "sizeLimit"}).get("medium") != "Memory":
            return []
        # Podman takes "size" for a quota of a disk.
        blocks = f"nr_blocks={bytes_of(spec['sizeLimit']) // 4096}"
        return ["--opt=type=tmpfs", "--opt=device=tmpfs", f"--opt=o={blocks}"]

    def _files(self, spec: Object) -> Iterator[Entry]:
        """The files of a ConfigMap or Secret, as a kubelet writes them: links to one generation."""
        if "secret" in spec:
            source = known(spec["secret"], {"secretName", "defaultMode", "items"})
            data = self.kubelet.data("Secret", source["secretName"])
        else:
            source = known(spec["configMap"], {"name", "defaultMode", "items"})
            data = self.kubelet.data("ConfigMap", source["name"])
        chosen = source.get("items") or [{"key": key, "path": key} for key in data]
        generation = "..2026_11_24_00_00_00.0000000001"
        yield folder("", 0o777)
        yield folder(generation, 0o755)
        yield "..data", tarfile.SYMTYPE, 0o777, generation.encode()
        for item in chosen:
            path = known(item, {"key", "path"})["path"]
            content = data[item["key"]]
            mode = source.get("defaultMode", 0o644)
            yield f"{generation}/{path}", tarfile.REGTYPE, mode, content
            yield path, tarfile.SYMTYPE, 0o777, f"..data/{path}".encode()


def folder(path: str, mode: int) -> Entry:
    return path, tarfile.DIRTYPE, mode, b""


def pack(volumes: Mapping[str, tuple[list[Entry], int]], group: int | None) -> bytes:
    """Return a tar archive of volumes' contents as root:group, or as root's alone.

    :param volumes: by name, what is in them and what the group may do.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for volume, (entries, rights) in volumes.items():
            for path, kind, mode, content in entries:
                info = tarfile.TarInfo(f"{volume}/{path}".rstrip("/"))
                info.type, info.mode, info.gid = kind, mode, group or 0
                if group is not None and kind != tarfile.SYMTYPE:
                    info.mode |= rights | (GROUP_ENTERS if kind == tarfile.DIRTYPE else 0)
                if kind == tarfile.SYMTYPE:
                    info.linkname = content.decode()
                    content = b""
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
