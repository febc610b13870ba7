"""docs/collector.md names every module of the package."""

from pathlib import Path

import iot_collector


def test_every_module_is_described() -> None:
    package = Path(iot_collector.__file__).parent
    text = (package.parent.parent / "docs/collector.md").read_text()
    names = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []
