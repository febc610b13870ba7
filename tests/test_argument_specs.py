"""A role's argument_specs.yml and its defaults agree: names, values, and types that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROLES = sorted(
    path.parent.parent for path in Path(__file__).parent.parent.glob("roles/*/defaults/main.yml")
)
PYTHON_TYPES = {
    "str": str,
    "path": str,
    "int": int,
    "bool": bool,
    "float": float,
    "list": list,
    "dict": dict,
}


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text()) or {}


def options(role: Path) -> dict:
    return load(role / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]


def test_there_are_roles() -> None:
    assert len(ROLES) >= 6


@pytest.fixture(params=ROLES, ids=lambda role: role.name)
def role(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_same_names_and_values(role: Path) -> None:
    specified = {name: spec.get("default") for name, spec in options(role).items()}
    assert specified == load(role / "defaults/main.yml")


def test_types_fit(role: Path) -> None:
    for name, value in load(role / "defaults/main.yml").items():
        spec = options(role)[name]
        if isinstance(value, str) and "{{" in value:
            continue  # known only when the play runs; Ansible checks it then
        expected = PYTHON_TYPES[spec["type"]]
        assert type(value) is expected, f"{name} is {value!r}, not {spec['type']}"
        if spec["type"] == "list":
            assert "elements" in spec, f"{name} does not say what is in the list"
        if "choices" in spec:
            assert value in spec["choices"], name


def test_everything_is_described(role: Path) -> None:
    for name, spec in options(role).items():
        assert spec.get("description", "").endswith("."), f"{name} needs a description"
        assert name.startswith(f"{role.name}_"), f"{name} does not begin with the role's name"


def test_defaults_are_commented(role: Path) -> None:
    assert "#" in (role / "defaults/main.yml").read_text()
