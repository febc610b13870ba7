"""Generates docs/configuration.md from the settings of the collector. Run this file to write it.

python tests/configuration_page.py
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from iot_collector.settings import PREFIX, VARIABLES, Settings
from jinja2 import Environment
from role_readmes import ROLES, roles

PAGE = ROLES.parent / "docs/configuration.md"

# The first word of a setting's name says what it is about; the last group has all others.
GROUPS = {
    "Broker": ("mqtt", "broker"),
    "Delivery": ("packet", "message", "session", "batch", "buffer", "replay"),
    "Payloads": ("cbor", "messagepack", "topic", "device"),
    "Database": ("database", "archive"),
    "HTTP, health and log": (),
}

TEMPLATE = """\
# Configuration

Written by `tests/configuration_page.py` from `collector/iot_collector/settings.py`.

## How to set something

The collector reads environment variables that begin with `{{ prefix }}`.

* With the playbooks, set the variables of the roles, in the inventory or with `-e`. If a setting of
  the collector has no variable, put it into `collector_environment` under its name on this page.
  [architecture.md](architecture.md#the-path-of-a-setting) shows how a value gets from the inventory
  to the process.
* A variable that is set to the empty string counts as not set.
* A wrong value stops the start. The error has the setting's name, the fault and an example. An
  unknown variable that begins with `{{ prefix }}` also stops the start.
* `iot-collector run --help` prints this list. `iot-collector check` connects to the broker and the
  database.
* Put passwords into files. A file is read again at every connection, so that a rotated password
  needs no restart.

{% for title, settings in groups.items() %}
## {{ title }}

| setting | values | default | meaning |
| --- | --- | --- | --- |
{% for setting in settings %}
| `{{ setting.name }}` | {{ setting.allowed }} | {{ setting.default }} | {{ setting.meaning }} |
{% endfor %}

{% endfor %}
## Variables of the roles

Each role's README lists its variables, with types and defaults. `platform` has those that all roles
share.

{% for role in roles %}
* [{{ role }}](../roles/{{ role }}/README.md)
{% endfor %}
"""


def code(value: object) -> str:
    """A value as in an environment variable, as code; an empty string for no value."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text.replace(f"iot-collector-{socket.gethostname()}", "iot-collector-<host name>")
    text = text.replace("|", "\\|")
    return f"`{text}`" if value is not None and text else ""


def allowed(schema: dict[str, Any]) -> str:
    """The allowed values of a setting, from its JSON schema."""
    if "anyOf" in schema:  # a type, or null
        (schema,) = (one for one in schema["anyOf"] if one["type"] != "null")
    if "enum" in schema:
        return ", ".join(map(code, schema["enum"]))
    if "maximum" in schema:
        return f"{schema['minimum']:,} to {schema['maximum']:,}".replace(",", " ")
    for limit, words in {"minimum": "at least {}", "exclusiveMinimum": "more than {}"}.items():
        if limit in schema:
            return words.format(f"{schema[limit]:,}".replace(",", " "))
    formats = {"file-path": "file", "path": "file", "password": "text"}
    names = {"boolean": "`true`, `false`", "array": "list, with commas", "string": "text"}
    return formats.get(schema.get("format", "")) or names[schema["type"]]


def page() -> str:
    """The content of docs/configuration.md."""
    schemas = Settings.model_json_schema()["properties"]
    groups: dict[str, list[dict[str, str]]] = {title: [] for title in GROUPS}
    for name, field in VARIABLES.items():
        word = name.removeprefix(PREFIX).partition("_")[0].lower()
        title = next((one for one in GROUPS if word in GROUPS[one]), list(GROUPS)[-1])
        default = (
            field.default if not isinstance(field.default, bool) else str(field.default).lower()
        )
        meaning = (field.description or "").replace("|", "\\|").replace("<", "\\<")
        [example] = field.examples or [None]
        if str(example).startswith("("):
            meaning += f" {example}"
        elif default in (None, "", []):
            meaning += f". Example: {code(example)}"
        schema = schemas[name.removeprefix(PREFIX).lower()]
        row = {"allowed": allowed(schema), "default": code(default), "meaning": meaning}
        groups[title].append({"name": name, **row})
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    names = [role.name for role in roles()]
    text = environment.from_string(TEMPLATE).render(prefix=PREFIX, groups=groups, roles=names)
    return text.rstrip() + "\n"


if __name__ == "__main__":
    Path(PAGE).write_text(page())
