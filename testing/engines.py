"""Container engines (Podman, Docker), and the images that the tests build."""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "collector/Dockerfile"
OWN_BASE = "localhost/iot-collector-test-base"  # stays in the engine's store for the next run
_BASE = ("--include=python3-venv,ca-certificates", "bookworm")

# The default of an engine can be higher than what this machine allows.
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")


class EngineError(Exception):
    """A command of an engine failed. The text is the end of its output."""


class Engine(NamedTuple):
    """Podman or Docker, and the base image of builds."""

    command: Sequence[str]
    base: str = ""

    def __call__(self, *arguments: str, timeout: float = 60) -> str:
        """Run a command of the engine and return what it printed.

        :raises EngineError: it failed, or took longer than ``timeout`` seconds.
        """
        return output([*self.command, *arguments], timeout)

    def has(self, image: str) -> bool:
        """Whether the image is in the engine's store."""
        try:
            return bool(self("image", "inspect", image))
        except EngineError:
            return False

    @property
    def read_only(self) -> list[str]:
        """Options for a container with a read-only root and no writable directory."""
        if self.command[0] == "podman":  # or it puts a tmpfs on /tmp, /run and /var/tmp
            return ["--read-only", "--read-only-tmpfs=false"]
        return ["--read-only"]

    def effective_rights(self, container: str) -> dict[str, str]:
        """Return fields of /proc/1/status in a container: Uid, CapEff, Seccomp, …"""
        status = self("exec", container, "cat", "/proc/1/status")
        return dict(line.split(":\t", 1) for line in status.splitlines())

    def inside(self, image: str, program: str, *arguments: str, user: str = "0") -> str:
        """Run a program in a container of the image; return its output."""
        options = (*LIMITS, f"--user={user}", f"--entrypoint={program}")
        return self("run", "--rm", *options, image, *arguments)


def output(command: Sequence[str], timeout: float) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"{command[0]} took longer than {timeout:g} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).splitlines()[-20:]
        raise EngineError("\n".join([f"{command[0]}: exit status {done.returncode}", *said]))
    return done.stdout


def _base(engine: Engine, folder: Path) -> str:
    """Return the base image of the Dockerfile, or one of ours if that cannot be pulled."""
    official: str
    (official,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    for image in (official, OWN_BASE):
        if engine.has(image):
            return image
    try:
        engine("pull", official, timeout=120)
    except EngineError as error:
        _import_debian(engine, OWN_BASE, _BASE, folder, error)
        return OWN_BASE
    return official


def _import_debian(
    engine: Engine, image: str, options: Sequence[str], folder: Path, reason: EngineError
) -> None:
    """Make an image of Debian's packages, because there is a reason why no other can be had.

    :param options: of mmdebstrap, the release among them.
    :param folder: for large temporary files.
    :raises EngineError: it cannot be made either.
    """
    if not shutil.which("mmdebstrap"):
        raise EngineError(f"{image}: mmdebstrap is not installed, and {reason}") from reason
    archive = folder / "debian.tar"
    output(["mmdebstrap", "--variant=essential", *options, str(archive)], 400)
    engine("import", str(archive), image, timeout=200)
    archive.unlink()


def find_engine(folder: Path) -> Engine:
    """Return the first engine that runs a container.

    :param folder: for large temporary files.
    :raises EngineError: there is none; the text has the reason of each.
    """
    reasons = {}
    # runc works on machines where Podman's default runtime does not.
    for command in (("podman",), ("podman", "--runtime=runc"), ("docker",)):
        if not shutil.which(command[0]):
            reasons[command[0]] = "not installed"
            continue
        try:
            Engine(command)("info")
            engine = Engine(command, _base(Engine(command), folder))
            engine.inside(engine.base, "true")
        except EngineError as error:
            reasons[" ".join(command)] = str(error).splitlines()[-1]
        else:
            return engine
    raise EngineError(f"no container engine works here: {reasons}")


def build(engine: Engine, folder: Path, *options: str) -> str:
    """Build with the repository as context; return the image id."""
    name = folder / "id"
    options = ("--network=host", LIMITS[0], f"--iidfile={name}", *options)
    engine("build", *options, ".", timeout=600)
    return name.read_text().strip()


# What the images of broker, database and Prometheus are in the parts that pods depend on, made of
# Debian's packages: the users' numbers, the programs on the PATH, entrypoint and stop signal.
_SERVICES = (
    "--include=mosquitto,mosquitto-clients,postgresql,prometheus",
    *(f"--dpkgopt=path-exclude=/usr/share/{unread}/*" for unread in ("doc", "man", "locale")),
    *(
        f'--customize-hook=chroot "$1" {kind}mod --{number}={value} {name}'
        for name, value in (("postgres", 999), ("mosquitto", 1883))
        for kind, number in (("user", "uid"), ("group", "gid"))
    ),
    "trixie",
)
_STAND_INS = {
    "mosquitto": 'CMD ["mosquitto"]',
    "postgres": (
        "ENV PATH=/usr/lib/postgresql/17/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
        'STOPSIGNAL SIGINT\nCMD ["postgres"]'
    ),
    "prometheus": 'USER nobody\nENTRYPOINT ["prometheus"]',
}


def service_images(engine: Engine, official: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return the images of broker, database and Prometheus, by component.

    :param official: their names; where they cannot be had, stand-ins of Debian's packages are.
    :param folder: for large temporary files.
    :raises EngineError: neither can be had.
    """
    try:
        for name in official.values():
            if not engine.has(name):
                engine("pull", name, timeout=120)
    except EngineError as error:
        base = f"localhost/iot-services-test:{sha256(repr(_SERVICES).encode()).hexdigest()[:12]}"
        if not engine.has(base):
            _import_debian(engine, base, _SERVICES, folder, error)
        made = {}
        for name in official:
            dockerfile = folder / name
            dockerfile.write_text(f"FROM {base}\n{_STAND_INS[name]}\n")
            made[name] = build(engine, folder, f"--file={dockerfile}")
        return made
    return dict(official)


# A machine that systemd boots: Debian with what the roles install, whose own services stay off.
_MACHINE = "debian:12"
_MACHINE_PACKAGES = (
    *("systemd-sysv", "ca-certificates", "python3-venv", "python3-packaging"),
    *("mosquitto", "mosquitto-clients", "postgresql"),
)
_MACHINE_SERVICES_OFF = "systemctl mask mosquitto postgresql"


def machine_image(engine: Engine, folder: Path) -> str:
    """Return the image of a machine, see `start_machine`.

    :param folder: for large temporary files.
    :raises EngineError: it cannot be made.
    """
    packages = " ".join(_MACHINE_PACKAGES)
    try:
        if not engine.has(_MACHINE):
            engine("pull", _MACHINE, timeout=120)
    except EngineError as error:
        name = f"localhost/iot-machine-test:{sha256(packages.encode()).hexdigest()[:12]}"
        if not engine.has(name):
            options = (
                f"--include={packages.replace(' ', ',')}",
                f'--customize-hook=chroot "$1" {_MACHINE_SERVICES_OFF}',
                "bookworm",
            )
            _import_debian(engine, name, options, folder, error)
        return name
    dockerfile = folder / "machine"
    dockerfile.write_text(
        f"FROM {_MACHINE}\nRUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install"
        f" --yes --no-install-recommends {packages} && {_MACHINE_SERVICES_OFF}\n"
    )
    return build(engine, folder, f"--file={dockerfile}")


def start_machine(engine: Engine, image: str, name: str, *options: str) -> None:
    """Start a container with systemd as its first process, on the network of this machine.

    :raises EngineError: it does not start.
    """
    if engine.command[0] == "podman":
        boot = ["--systemd=always"]
    else:
        boot = [
            "--stop-signal=SIGRTMIN+3",
            "--cgroupns=host",
            "--volume=/sys/fs/cgroup:/sys/fs/cgroup",
        ]
        boot += [f"--tmpfs={path}" for path in ("/run", "/run/lock", "/tmp")]
    # systemd needs this to give a unit its own view of the file system.
    boot += [
        "--cap-add=SYS_ADMIN",
        "--security-opt=seccomp=unconfined",
        "--security-opt=apparmor=unconfined",
    ]
    limits = ("--ulimit=nofile=20000:20000", "--ulimit=nproc=4096:4096")
    options = (*boot, *limits, "--network=host", f"--name={name}", *options)
    engine("run", "--detach", *options, image, "/lib/systemd/systemd")
