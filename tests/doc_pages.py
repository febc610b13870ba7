"""Checks for documentation pages: links, commands, variables and settings.

The options of known programs are checked. A command of another program has to be marked: the block,
the paragraph above it, or the head of the page says what it needs ("# needs AWS", "The commands on
this page need …").
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import click
import yaml
from iot_collector.cli import main
from iot_collector.settings import VARIABLES

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "benchmarks/README.md",
    ]
)

# Variables for -e that belong to no role. test_docs.py checks that they are used.
PLAYBOOK_VARIABLES = {
    *(
        "confirm",
        "file",
        "final_snapshot",
        "kube_context",
        "kubeconfig",
        "region",
        "remove_data",
        "target",
    )
}
SHELLS = {"", "sh", "bash", "shell", "console"}
# Shell builtins and common programs that are not checked.
UNCHECKED = {"cat", "cd", "do", "done", "echo", "export", "for", "in", "mkdir", "sed", "source"}


@dataclass
class Block:
    """A fenced code block, and the paragraph above it."""

    language: str
    body: str
    above: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced code blocks of a page."""
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        above = text[: match.start()].rstrip().rpartition("\n\n")[2]
        yield Block(match[2], match[3], above)


def without_code(text: str) -> str:
    """The text without code blocks and code in backquotes."""
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)[^`]+\1", "", text)


def inline(text: str) -> list[str]:
    """The code in backquotes, each on one line."""
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def commands(code: str) -> Iterator[list[str]]:
    """The commands of shell code, without comments, operators, redirections and assignments."""
    # shlex drops the newline after a comment, but it also ends the command before the comment.
    code = code.replace("\\\n", " ").replace("\n", "\n\n")
    lexer = shlex.shlex(code, posix=True, punctuation_chars=";&|()<>\n")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    command: list[str] = []
    for token in [*lexer, "\n"]:
        if not re.fullmatch(r"[;&|()<>\n]+", token):
            command.append(token)
            continue
        while command and re.match(r"(\w+=|do$|\$$|[^\w./])", command[0]):
            del command[0]
        if command:
            yield command
        # The word after a redirection is a file, not a command.
        command = ["cat"] if re.search("[<>]", token) else []


def anchors(text: str) -> set[str]:
    """The anchors that GitHub generates for the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def role_variables() -> set[str]:
    """The variables that roles declare."""
    found = set(PLAYBOOK_VARIABLES)
    for path in (ROOT / "roles").glob("*/meta/argument_specs.yml"):
        for spec in yaml.safe_load(path.read_text())["argument_specs"].values():
            found |= set(spec.get("options", {}))
    return found


@cache
def make_targets() -> set[str]:
    """The targets of the Makefile."""
    text = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    return set(re.findall(r"^([\w./-]+):(?!=)", text, re.MULTILINE))


def check_ansible(arguments: list[str]) -> Iterator[str]:
    for argument in arguments:
        if argument.endswith((".yml", ".yaml")) and not (ROOT / argument).is_file():
            yield f"there is no {argument}"
    for option, value in pairwise(arguments):
        name = value.partition("=")[0]
        if option == "-e" and name not in role_variables():
            yield f"no role declares the variable {name}"


def check_collector(arguments: list[str]) -> Iterator[str]:
    command: click.Command = main
    for argument in arguments:
        name = argument.partition("=")[0]
        options = {one for parameter in command.params for one in parameter.opts}
        if name.startswith("--"):
            if name not in options | {"--help"}:
                yield f"iot-collector {command.name} has no option {name}"
        elif isinstance(command, click.Group) and re.fullmatch(r"[a-z][\w-]*", argument):
            found = command.commands.get(argument)
            if found is None:
                yield f"iot-collector has no command {argument}"
                return
            command = found


def check_make(arguments: list[str]) -> Iterator[str]:
    for argument in arguments:
        if re.fullmatch(r"[\w./-]+", argument) and argument not in make_targets():
            yield f"make has no target {argument}"


def check_pip(arguments: list[str]) -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"(?:\.|iot-collector)\[([\w,]+)\]", " ".join(arguments)):
        for name in extra.split(","):
            if name not in project["optional-dependencies"]:
                yield f"pyproject.toml has no extra {name}"


def check_python(arguments: list[str]) -> Iterator[str]:
    for argument in arguments:
        if "/" in argument and argument.endswith(".py") and not (ROOT / argument).is_file():
            yield f"there is no {argument}"
    for option, value in pairwise(arguments):
        if option != "-m" or value in {"venv", "pip", "pytest"}:
            continue
        place = ROOT / value.replace(".", "/")
        if not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()):
            yield f"there is no module {value}"


def check_status(arguments: list[str]) -> Iterator[str]:
    program = (ROOT / "roles/host_base/files/iot_status.py").read_text()
    for argument in arguments:
        if argument.startswith("--") and f'"{argument}"' not in program:
            yield f"iot-status has no option {argument}"


CHECKED = {
    "ansible-playbook": check_ansible,
    "iot-collector": check_collector,
    "iot-status": check_status,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
}


def check_command(command: list[str], *, marked: bool) -> Iterator[str]:
    """Yield the problems of a command in a code block."""
    program = Path(command[0]).name
    # In a container or a pod: kubectl exec … -- iot-collector …, docker run … iot-collector …
    if "iot-collector" in command[1:] and {"run", "exec"} & {*command}:
        yield from check_collector(command[len(command) - command[::-1].index("iot-collector") :])
    if program in CHECKED:
        yield from CHECKED[program](command[1:])
    elif program not in UNCHECKED and not marked:
        yield f"nothing says what `{program}` needs"


def check_commands(text: str) -> Iterator[str]:
    needs = re.compile(r"\bneeds?\b")
    head = text.partition("\n## ")[0]
    head = without_code(head) if re.search(r"commands\s+on\s+this\s+page\s+need", head) else ""
    for block in blocks(text):
        if block.language not in SHELLS or block.body.startswith((" ", "devices", "broker")):
            continue  # another language, or a diagram
        comments = "\n".join(re.findall(r"^#.*", block.body, re.MULTILINE))
        marked = any(map(needs.search, (comments, block.above, head)))
        try:
            for command in commands(block.body):
                yield from check_command(command, marked=marked)
        except ValueError as error:
            yield f"the shell cannot read a block ({error}): {block.body[:60]!r}"
    for code in inline(text):
        if Path(code.split(" ")[0]).name in CHECKED:
            try:
                for command in commands(code):
                    yield from check_command(command, marked=True)
            except ValueError as error:
                yield f"the shell cannot read `{code}` ({error})"


def check_links(text: str, page: Path) -> Iterator[str]:
    prose = without_code(text)
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    links += re.findall(r"^\[[^]]+\]: (\S+)$", prose, re.MULTILINE)
    for link in links:
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            yield f"the link {link} leads nowhere"
        elif anchor and anchor not in anchors(text if target == page else target.read_text()):
            yield f"the link {link} has no such heading"


def check_names(text: str) -> Iterator[str]:
    """Settings anywhere, variables in blocks of YAML, and files in backquotes."""
    for name in sorted(set(re.findall(r"\bIOT_[A-Z0-9_]*[A-Z0-9]\b(?!_)", text))):
        if name not in VARIABLES:
            yield f"there is no setting {name}"
    for block in blocks(text):
        content = yaml.safe_load(block.body) if block.language == "yaml" else None
        for name in content if isinstance(content, dict) and "apiVersion" not in content else ():
            if name not in role_variables():
                yield f"no role declares the variable {name}"
    folders = "benchmarks|collector|docs|inventories|molecule|playbooks|plugins|roles|testing|tests"
    for code in inline(text):
        path = code.split(" ")[0] if code.startswith("playbooks/") else code
        if not re.fullmatch(rf"({folders})/[\w./*-]*", path) or path.endswith("local.yml"):
            continue
        if path != "playbooks/local.yml" and not any(ROOT.glob(path.rstrip("/"))):
            yield f"there is no {path}"


def problems(text: str, page: Path) -> list[str]:
    """The problems of a page."""
    return [*check_links(text, page), *check_commands(text), *check_names(text)]
