"""Renders the templates of the roles like Ansible, and runs the SQL template with psql."""

import json
import shlex
import subprocess
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from testing.collector import clean_environment, run_command
from testing.postgres import Database, Postgres, postgres_binary
from testing.service import HOST

ROLES = Path(__file__).parent.parent / "roles"
OWNER, READER, MONITOR, DATABASE = "iot_collector", "iot_reader", "iot_monitor", "iot"


def render(template: str, **variables: object) -> str:
    """Render ``role/name.j2``. An undefined variable is an error."""
    role, name = template.split("/")
    environment = Environment(
        loader=FileSystemLoader(ROLES / role / "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["to_json"] = json.dumps
    environment.filters["bool"] = bool
    return environment.get_template(name).render(ansible_managed="Ansible managed", **variables)


class Roles:
    """roles.sql for a server, with password files in the directory of the server."""

    has_monitor = True

    def __init__(self, server: Postgres) -> None:
        self.server = server
        self.passwords = {OWNER: "owner-secret", READER: "reader-secret", MONITOR: "monitor-secret"}

    def file(self, role: str) -> Path:
        """The file with the password of a role."""
        return self.server.folder / f"{role} password"  # the path needs quotes

    @property
    def script(self) -> Path:
        return self.server.folder / "roles.sql"

    def render_script(self) -> None:
        self.script.write_text(
            render(
                "postgres/roles.sql.j2",
                postgres_database=DATABASE,
                postgres_owner=OWNER,
                postgres_reader=READER,
                postgres_monitor=MONITOR,
                __postgres_owner_password_file=str(self.file(OWNER)),
                __postgres_reader_password_file=str(self.file(READER)),
                __postgres_monitor_password_file=str(self.file(MONITOR))
                if self.has_monitor
                else "",
            )
        )

    def apply(self) -> subprocess.CompletedProcess[str]:
        """Write the password files and run the script, as superuser."""
        for role, password in self.passwords.items():
            self.file(role).write_text(f"{password}\n")
        self.render_script()
        return subprocess.run(
            [
                *(postgres_binary("psql"), "-X", "-v", "ON_ERROR_STOP=1", "-f", str(self.script)),
                *("-h", HOST, "-p", str(self.server.port), "-U", "postgres", "-d", "postgres"),
            ],
            env=clean_environment() | {"PGPASSWORD": "postgres"},
            capture_output=True,
            text=True,
            check=False,
        )

    def database(self, role: str) -> Database:
        """The database with one of the roles as user."""
        return Database(self.server, DATABASE, role, self.passwords[role])

    def install(self) -> Database:
        """Set the server up as the roles do; return the migrated database, with its owner as user.

        The socket is in the directory of the server.
        """
        server = self.server
        server.query(f"ALTER SYSTEM SET unix_socket_directories = '{server.folder}'")
        server.stop()
        server.start()
        done = self.apply()
        assert done.returncode == 0, done.stderr
        database = self.database(OWNER)
        done = run_command("migrate", **database.environment())
        assert done.returncode == 0, done.stderr
        return database
