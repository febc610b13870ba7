"""The broker Mosquitto, its password file and its plugin for access control."""

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from .publisher import publish
from .service import HOST, IS_ROOT, Service, binary, free_port

NO_LIMITS = ("max_inflight_messages 10000", "max_queued_messages 0", "log_type all")


class Mosquitto(Service):
    """A Mosquitto broker with a plain listener, and more as the test needs.

    :param settings: lines of mosquitto.conf for the whole broker.
    :param limits: such lines too, in the place of those without limits that log everything.
    :param scheme: how the collector connects; unless it is mqtt, to a listener of its own.
    :param listener: lines of mosquitto.conf for that listener.
    """

    name = "mosquitto"

    def __init__(
        self,
        folder: Path,
        *settings: str,
        limits: Sequence[str] = NO_LIMITS,
        anonymous: bool = True,
        scheme: str = "mqtt",
        listener: Sequence[str] = (),
        port: int | None = None,
        program: str = "mosquitto",
    ) -> None:
        super().__init__(folder)
        self.port = port or free_port()
        self.program = program
        self.scheme = scheme
        self._collector_port = self.port if scheme == "mqtt" else free_port()
        lines = [
            "persistence true",
            f"persistence_location {folder}/",
            *limits,
            f"allow_anonymous {str(anonymous).lower()}",
            *settings,
            f"listener {self.port} {HOST}",
        ]
        if IS_ROOT:
            lines.insert(0, "user root")  # another user could not read its files
        if scheme != "mqtt":
            lines += [f"listener {self._collector_port} {HOST}", *listener]
        self.config = folder / "mosquitto.conf"
        self.config.write_text("\n".join([*lines, ""]))

    @property
    def url(self) -> str:
        """Where the collector connects."""
        return f"{self.scheme}://{HOST}:{self._collector_port}"

    def environment(self) -> dict[str, str]:
        """The collector's settings for this broker."""
        return {"IOT_MQTT_URL": self.url}

    def command(self) -> Sequence[str]:
        return [binary(self.program, "/usr/sbin", "/usr/local/sbin"), "-c", str(self.config)]

    def ready(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex((HOST, self.port)) == 0

    def reload(self) -> None:
        """Make it read its password and ACL files again (SIGHUP)."""
        self.signal(signal.SIGHUP)


class DynamicSecurity:
    """Mosquitto's plugin for access control: unlike an acl_file, it can refuse a SUBSCRIBE.

    Anyone may do anything, but for what the role ``anyone`` is denied; ``admin`` may change that.
    """

    def __init__(self, folder: Path, deny_subscribe: str) -> None:
        self.file = folder / "dynamic-security.json"
        salt = os.urandom(12)
        digest = hashlib.pbkdf2_hmac("sha512", b"admin", salt, 101)
        control = {"acltype": "publishClientSend", "topic": "$CONTROL/#", "allow": True}
        denial = {"acltype": "subscribeLiteral", "topic": deny_subscribe, "allow": False}
        access = ("publishClientSend", "publishClientReceive", "subscribe", "unsubscribe")
        config = {
            "defaultACLAccess": dict.fromkeys(access, True),
            "clients": [
                {
                    "username": "admin",
                    "password": base64.b64encode(digest).decode(),
                    "salt": base64.b64encode(salt).decode(),
                    "iterations": 101,
                    "roles": [{"rolename": "admin"}],
                }
            ],
            "groups": [{"groupname": "anyone", "roles": [{"rolename": "anyone"}]}],
            "roles": [
                {"rolename": "admin", "acls": [control]},
                {"rolename": "anyone", "acls": [denial]},
            ],
            "anonymousGroup": "anyone",
        }
        self.file.write_text(json.dumps(config))

    @property
    def settings(self) -> list[str]:
        """Lines of mosquitto.conf."""
        plugins = sorted(Path("/usr/lib").glob("*/mosquitto_dynamic_security.so"))
        assert plugins, "Mosquitto's dynamic-security plugin is missing; `make test` installs it"
        return [f"plugin {plugins[0]}", f"plugin_opt_config_file {self.file}"]

    def allow(self, broker: "Mosquitto", topic_filter: str) -> None:
        """Allow the subscriptions that were denied."""
        command = {
            "command": "removeRoleACL",
            "rolename": "anyone",
            "acltype": "subscribeLiteral",
            "topic": topic_filter,
        }
        topic, payload = "$CONTROL/dynamic-security/v1", json.dumps({"commands": [command]})
        publish(broker, [(topic, payload.encode())], username="admin", password="admin")


def write_passwords(file: Path, users: Mapping[str, str]) -> None:
    """Write a Mosquitto password file."""
    file.write_text("".join(f"{user}:{password}\n" for user, password in users.items()))
    file.chmod(0o600)
    subprocess.run([binary("mosquitto_passwd"), "-U", str(file)], check=True, capture_output=True)
