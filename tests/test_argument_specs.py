"""Each role declares its variables once, and uses no private variables of other roles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = sorted(
    path.parent.parent
    for path in Path(__file__).parent.parent.glob("roles/*/meta/argument_specs.yml")
)
NAMES = {role.name for role in ROLES}
PYTHON_TYPES = {
    "str": str,
    "path": str,
    "int": int,
    "bool": bool,
    "float": float,
    "list": list,
    "dict": dict,
}
# Shared settings of all roles start with the namespace of the collection.
PREFIXES = {"platform": "iot_"}
# Roles with shared settings: for all roles, and for all AWS roles.
SHARED = {"platform", "aws_base"}
# Facts that a role sets for other roles, and the task file that documents them.
FACTS = {
    "aws_base_identity": "preflight.yml",
    "aws_base_outputs": "stack.yml",
    "ecr_outputs": "main.yml",
    "eks_outputs": "main.yml",
    "iot_core_arns": "preflight.yml",
    "iot_core_outputs": "main.yml",
    "kubernetes_base_job_log": "job.yml",
    "kubernetes_base_namespace_exists": "main.yml",
    "kubernetes_base_secrets": "secrets.yml",
    "network_outputs": "main.yml",
    "rds_ca_certificates": "preflight.yml",
    "rds_outputs": "main.yml",
}


def load(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text()) if path.exists() else None) or {}


def entry_points(role: Path) -> dict[str, dict[str, Any]]:
    """The options of each entry point, by the name of the entry point."""
    specs = load(role / "meta/argument_specs.yml")["argument_specs"]
    return {name: spec["options"] for name, spec in specs.items()}


@pytest.fixture(params=ROLES, ids=lambda role: role.name)
def role(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_every_role_has_a_specification() -> None:
    assert {path.name for path in ROLES[0].parent.iterdir()} == NAMES


def test_defaults_equal_the_specification(role: Path) -> None:
    specified = {name: spec.get("default") for name, spec in entry_points(role)["main"].items()}
    assert specified == load(role / "defaults/main.yml")


def test_types_of_the_defaults_are_correct(role: Path) -> None:
    for name, value in load(role / "defaults/main.yml").items():
        spec = entry_points(role)["main"][name]
        if isinstance(value, str) and "{{" in value:
            continue  # Ansible checks templates at run time
        expected = PYTHON_TYPES[spec["type"]]
        assert type(value) is expected, f"{name} is {value!r}, not {spec['type']}"
        if spec["type"] == "list":
            assert "elements" in spec, f"{name} does not say what is in the list"
        if "choices" in spec:
            assert value in spec["choices"], name


def test_options_are_described_and_prefixed(role: Path) -> None:
    prefix = PREFIXES.get(role.name, f"{role.name}_")
    for options in entry_points(role).values():
        for name, spec in options.items():
            assert spec.get("description", "").endswith("."), f"{name} needs a description"
            assert name.startswith(prefix), f"{name} does not begin with {prefix}"


def test_defaults_are_commented(role: Path) -> None:
    defaults = role / "defaults/main.yml"
    assert not defaults.exists() or "#" in defaults.read_text()


def test_entry_points_are_task_files(role: Path) -> None:
    for name in set(entry_points(role)) - {"main"}:
        assert (role / f"tasks/{name}.yml").exists(), name


def variables(text: str) -> Iterator[str]:
    """The variables in Jinja expressions, and in conditions, which have no braces."""
    expressions = re.findall(r"{[{%](.*?)[%}]}", text, re.DOTALL)
    expressions += re.findall(r"^\s*(?:when|that|until|failed_when|changed_when): (.*)", text, re.M)
    for expression in expressions:
        without_texts = re.sub(r"'[^']*'|\"[^\"]*\"", "''", expression)
        yield from re.findall(r"(?<![\w.])_*[a-z]\w*(?![\w(])", without_texts)


def owner(name: str) -> str | None:
    """The role with the prefix of a variable, or None."""
    found = [other for other in NAMES if name.lstrip("_").startswith(f"{other}_")]
    return max(found, key=len, default=None)


def test_role_uses_only_its_own_or_declared_variables(role: Path) -> None:
    """Settings of other roles are only used in defaults/, as defaults of its own settings."""
    files = [path for path in role.rglob("*") if path.suffix in {".yml", ".j2"}]
    wrong = []
    for path in files:
        if path.parent.name == "meta":
            continue
        for name in variables(path.read_text()):
            other = owner(name)
            if other in (None, role.name) or name in FACTS:
                continue
            public = {
                option
                for options in entry_points(role.parent / other).values()
                for option in options
            }
            where = path.relative_to(role)
            if name not in public:
                wrong.append(f"{where}: {name} is private to the role {other}")
            elif path.parent.name != "defaults" and other not in SHARED:
                wrong.append(f"{where}: {name} belongs to {other}; read it in defaults/main.yml")
    assert not wrong, "\n".join(sorted(set(wrong)))


@pytest.mark.parametrize("fact", FACTS)
def test_facts_are_set_and_documented(fact: str) -> None:
    role = ROLES[0].parent / str(owner(fact))
    text = (role / "tasks" / FACTS[fact]).read_text()
    assert re.search(rf"^ *{fact}:", text, re.M), "nothing sets it"
    assert re.search(rf"^#.*`{fact}`", text, re.M), "its file does not say that it is there"
