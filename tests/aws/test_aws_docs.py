"""docs/aws.md: its links, variables and commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore import xform_name
from cost_tables import PAGE, ROOT, settings
from test_templates import ROLES

TEXT = PAGE.read_text()
BLOCKS = [
    (language, body)
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
]
# Variables of playbooks/*.yml and not of a role.
PLAYBOOK_VARIABLES = {"region", "target", "confirm", "final_snapshot"}
# Commands of the AWS CLI that are not operations of a service.
CLI_ONLY = {("sso", "login"), ("eks", "get-token"), ("service-quotas", "")}


def command_blocks() -> list[str]:
    """Code blocks with commands. The block that starts with a space is a diagram."""
    return [body for language, body in BLOCKS if not language and not body.startswith(" ")]


def commands(program: str) -> list[list[str]]:
    """Each command line of a program, in code blocks and between backquotes."""
    lines = "\n".join(command_blocks()).replace("\\\n", " ").splitlines()
    inline = [" ".join(one.split()) for one in re.findall(r"(?<!`)`([^`]+)`", TEXT)]
    return [
        shlex.split(line, comments=True)
        for line in [one.strip() for one in lines] + inline
        if line.startswith((f"{program} ", f".venv/bin/{program} "))
    ]


def test_page_is_not_too_long() -> None:
    assert len(TEXT.splitlines()) <= 420


def test_commands_say_what_they_need() -> None:
    assert len(command_blocks()) > 5
    for body in command_blocks():
        assert re.match(r"# (offline|needs AWS)", body), body


@pytest.mark.parametrize("body", command_blocks(), ids=range(len(command_blocks())))
def test_commands_are_valid_shell(body: str) -> None:
    done = subprocess.run(["bash", "-n"], input=body, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_offline_commands_work(tmp_path: Path) -> None:
    (body,) = [one for one in command_blocks() if one.startswith("# offline")]
    script = body.replace("/tmp/iot-policy", str(tmp_path / "policy"))
    subprocess.run(["bash", "-euc", script], cwd=ROOT, check=True)
    made = sorted((tmp_path / "policy").iterdir())
    assert [one.name for one in made] == sorted(
        one.name for one in (ROOT / "docs/aws-deploy-policy").iterdir()
    )
    for one in made:
        text = one.read_text()
        assert not re.search("eu-west-1|111122223333|iot.system", text)
        assert "999988887777" in text


@pytest.mark.parametrize("command", commands("ansible-playbook"), ids=" ".join)
def test_playbook_commands_have_valid_options(command: list[str]) -> None:
    _, playbook, *options = command
    known = set(settings()) | PLAYBOOK_VARIABLES
    for option, value in pairwise(options):
        if option == "-e":
            assert value.partition("=")[0] in known, value
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("ansible-playbook")), "--syntax-check"),
            *(str(ROOT / playbook), *(one for one in options if one != "--check")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_variables_of_the_page_exist() -> None:
    known = set(settings()) | PLAYBOOK_VARIABLES
    prefixes = "|".join(("aws_base", *ROLES))
    named = set(re.findall(rf"\b((?:{prefixes})_[a-z0-9_]+)\b", TEXT))
    assert {name for name in named if name not in known} <= {"iot_core"}
    for language, body in BLOCKS:
        if language == "yaml":
            assert set(yaml.safe_load(body)) <= known


@pytest.mark.parametrize("command", commands("aws"), ids=" ".join)
def test_aws_commands_and_options_exist(command: list[str]) -> None:
    service, operation = (*command[1:3], "")[:2]
    if (service, operation) in CLI_ONLY:
        return
    model = botocore.session.get_session().get_service_model(service)
    operations = {xform_name(name, "-"): name for name in model.operation_names}
    assert operation in operations
    shape: Any = model.operation_model(operations[operation]).input_shape
    members = {xform_name(name, "-") for name in (shape.members if shape else {})}
    options = {one.removeprefix("--") for one in command if one.startswith("--")}
    assert options - {"region"} <= members


def test_each_stack_is_described() -> None:
    for role in ROLES:
        assert f"`<name>-{role.replace('_', '-')}`" in TEXT
