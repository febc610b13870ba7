"""The documentation: everything that it names exists, and its lists are complete."""

from __future__ import annotations

import re
from pathlib import Path

import configuration_page
import iot_collector
import payloads_page
import pytest
import yaml
from doc_pages import PAGES, PLAYBOOK_VARIABLES, ROOT, blocks, problems

from testing.postgres import Database

OPERATIONS = (ROOT / "docs/operations.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_commands_and_names(page: Path) -> None:
    assert problems(page.read_text(), page) == []


WRONG = {
    "[x](docs/missing.md)": "the link docs/missing.md leads nowhere",
    "[x](#missing)": "the link #missing has no such heading",
    "[x](docs/kubernetes.md#missing)": "the link docs/kubernetes.md#missing has no such heading",
    "[x]: docs/missing.md": "the link docs/missing.md leads nowhere",
    "```sh\nansible-playbook playbooks/missing.yml\n```": "there is no playbooks/missing.yml",
    "```\nansible-playbook playbooks/host.yml -e missing=1\n```": (
        "no role declares the variable missing"
    ),
    "`ansible-playbook playbooks/host.yml\n-e missing=1`": "no role declares the variable missing",
    "```sh\niot-collector missing\n```": "iot-collector has no command missing",
    "```sh\n/x/bin/iot-collector simulate --missing 1\n```": (
        "iot-collector simulate has no option --missing"
    ),
    "```sh\n# needs docker\ndocker run --rm x iot-collector missing\n```": (
        "iot-collector has no command missing"
    ),
    "```sh\niot-status --missing\n```": "iot-status has no option --missing",
    "```sh\ncd x && make missing\n```": "make has no target missing",
    "```sh\nmake up  # it's all\nmake missing\n```": "make has no target missing",
    "```sh\npip install '.[missing]'\n```": "pyproject.toml has no extra missing",
    "```sh\npython -m missing\n```": "there is no module missing",
    "```sh\npython tests/missing.py\n```": "there is no tests/missing.py",
    "```sh\nkubectl get pods\n```": "nothing says what `kubectl` needs",
    "```sh\nX=$(aws sts get-caller-identity)\n```": "nothing says what `aws` needs",
    "```sh\necho 'x\n```": 'the shell cannot read a block (No closing quotation): "echo \'x\\n"',
    "IOT_MISSING": "there is no setting IOT_MISSING",
    "```yaml\nmissing: 1\n```": "no role declares the variable missing",
    "`tests/missing.py`": "there is no tests/missing.py",
}


@pytest.mark.parametrize(("text", "found"), WRONG.items(), ids=range(len(WRONG)))
def test_wrong_text_is_found(text: str, found: str) -> None:
    assert problems(text + "\n", ROOT / "README.md") == [found]


@pytest.mark.parametrize(
    "text",
    [
        "```sh\n# needs AWS\naws sts get-caller-identity\n```",
        "This needs AWS:\n\n```sh\naws sts get-caller-identity\n```",
        "The commands on this page need AWS.\n\n## One\n\n```sh\naws sts get-caller-identity\n```",
        "```mermaid\nkubectl --> x\n```",
        "# One: `two` & three\n\n[x](#one-two--three)",
    ],
)
def test_correct_text_is_accepted(text: str) -> None:
    assert problems(text + "\n", ROOT / "README.md") == []


def test_variables_of_playbooks_are_used() -> None:
    places = [*ROOT.glob("playbooks/*.yml"), *ROOT.glob("roles/*/defaults/main.yml")]
    places += [*ROOT.glob("roles/*/tasks/*.yml"), *ROOT.glob("inventories/*/group_vars/*/main.yml")]
    used = "\n".join(place.read_text() for place in places)
    unused = {name for name in PLAYBOOK_VARIABLES if not re.search(rf"\b{name}\b", used)}
    assert unused == set()


def test_readme_has_at_most_100_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_readme_links_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    pages = [
        str(page.relative_to(ROOT))
        for page in PAGES
        if page.name != "README.md" and page.parent.name != "runbooks"
    ]
    assert [page for page in pages if f"({page})" not in readme] == []


def test_figures_of_the_readme_are_measured() -> None:
    """The ranges in the table and the figures below it are in the results."""
    (section,) = re.findall(
        r"^## Why not.*?(?=^## )", (ROOT / "README.md").read_text(), re.M | re.S
    )
    results = "".join(
        (ROOT / name).read_text()
        for name in ("benchmarks/RESULTS.md", "benchmarks/DELAY.md", "docs/faults.md")
    )
    figures = re.findall(r"\d[\d .]* to \d[\d .]*\d|\d+\.\d+", section)
    assert len(figures) >= 14
    assert [figure for figure in figures if figure not in results] == []


def test_every_module_is_described() -> None:
    package = Path(iot_collector.__file__).parent
    text = (ROOT / "docs/architecture.md").read_text()
    names = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    names |= {f"{file.parent.name}/" for file in package.glob("*/__init__.py")}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_roles_of_the_playbooks_are_described() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    found = dict(re.findall(r"^\| `(playbooks/\w+\.yml)` \| (.*) \|$", text, re.MULTILINE))
    expected = {}
    for path in sorted((ROOT / "playbooks").glob("*.yml")):
        play = yaml.safe_load(path.read_text())[0]
        if "roles" in play:
            roles = [role["role"].removeprefix("iot.platform.") for role in play["roles"]]
            expected[f"playbooks/{path.name}"] = ", ".join(roles)
    assert found == expected


def test_configuration_is_current() -> None:
    written = configuration_page.PAGE.read_text()
    assert written == configuration_page.page(), "run: .venv/bin/python tests/configuration_page.py"


def test_examples_of_payloads_are_current() -> None:
    written = payloads_page.PAGE.read_text()
    assert written == payloads_page.page(), "run: .venv/bin/python tests/payloads_page.py"


def alerts() -> list[str]:
    """The names of all alerts."""
    return [
        rule["alert"]
        for path in sorted(ROOT.glob("roles/prometheus/files/rules/*.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]


def test_every_alert_has_a_runbook() -> None:
    pages = {path.stem: path.read_text() for path in (ROOT / "docs/runbooks").glob("*.md")}
    assert sorted(pages) == sorted(alerts())
    for name, page in pages.items():
        assert page.startswith(f"# {name}\n"), name
        headings = re.findall(r"^## (\w+)$", page, re.M)
        assert headings == ["Meaning", "Impact", "Diagnosis", "Mitigation"], name
    listed = re.findall(r"^\| \[(\w+)\]\(runbooks/", OPERATIONS, re.M)
    assert sorted(listed) == sorted(pages)


def test_sql_for_the_fallback_table_moves_its_rows(database: Database) -> None:
    database.query(
        "INSERT INTO dead_letters_fallback"
        " VALUES (now(), 'a', 'b', NULL, 1, false, 'reason', '23514', 'refusal')"
    )
    (statement,) = [block.body for block in blocks(OPERATIONS) if block.language == "sql"]
    database.query(statement)
    assert [(letter.payload, letter.reason) for letter in database.dead_letters()] == [
        (b"b", "reason")
    ]
    assert database.count("dead_letters_fallback") == 0


def test_privileges_for_the_collector_are_sufficient(database: Database) -> None:
    """The GRANT statements of docs/collector.md include the functions that `run` calls."""
    role = f"{database.name}_granted"
    database.query(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    page = (ROOT / "docs/collector.md").read_text()
    (grants,) = [block.body for block in blocks(page) if block.language == "sql"]
    database.query(grants.replace("TO collector", f"TO {role}"))
    user = Database(database.server, database.name, role, "x")
    user.query("SELECT ensure_partitions(now(), 1)")
    user.query("SELECT update_summaries('a', now())")
    user.query("SELECT summarize_again(now(), now())")
    user.query("SELECT count_silent_topics(10)")
