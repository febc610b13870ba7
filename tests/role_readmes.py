"""Generates the README of each role from its meta/. Run this file to write them all.

python tests/role_readmes.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

ROLES = Path(__file__).parent.parent / "roles"

TEMPLATE = """\
# iot.platform.{{ name }}

{{ description }}.

{% for entry, spec in entries.items() %}
## {{ "Variables" if entry == "main" else "tasks_from: " ~ entry }}

{{ spec.short_description }}.

{% if spec.options %}
| variable | type | default | description |
| --- | --- | --- | --- |
{% for option, about in spec.options.items() %}
| `{{ option }}` | {{ about.type }} | {{ about | shown }} | {{ about.description }} |
{% for key, inner in (about.options or {}).items() %}
| `{{ option }}.{{ key }}` | {{ inner.type }} | {{ inner | shown }} | {{ inner.description }} |
{% endfor %}
{% endfor %}

{% endif %}
{% endfor %}
{% if dependencies %}
Settings that all roles share: [platform](../platform/README.md).
{% endif %}
"""


def shown(option: dict[str, Any]) -> str:
    """The default of an option, for a table cell."""
    if "default" not in option:
        return "required" if option.get("required") else ""
    value = option["default"]
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    text = " ".join(text.removesuffix("...\n").split()).replace("|", "\\|")
    return f"`{text}`" if text else "empty"


def readme(role: Path) -> str:
    """The content of a role's README.md."""
    about = yaml.safe_load((role / "meta/main.yml").read_text())
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    environment.filters["shown"] = shown
    text = environment.from_string(TEMPLATE).render(
        name=role.name,
        description=about["galaxy_info"]["description"],
        entries=specs,
        dependencies=about["dependencies"],
    )
    return text.rstrip() + "\n"


def roles() -> list[Path]:
    """The directories of all roles."""
    return sorted(path.parent.parent for path in ROLES.glob("*/meta/argument_specs.yml"))


if __name__ == "__main__":
    for path in roles():
        (path / "README.md").write_text(readme(path))
