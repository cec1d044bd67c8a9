"""The list of checks is complete: every check has an entry and a test, and the docs have the same table."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from pdctl.doctor.areas.kernel import PATTERNS
from pdctl.doctor.catalogue import CHECKS, markdown
from pdctl.doctor.counters import RULES

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs" / "doctor.md"
SOURCES = ROOT / "pdctl" / "doctor"


def emitted() -> set[str]:
    """Ids of findings in the code."""
    found = {rule.id for rule in RULES} | {pattern.id for pattern in PATTERNS}
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding" and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    found.add(str(first.value))
                elif isinstance(first, ast.JoinedStr):
                    found |= {"pcie.width", "pcie.speed"}
    return found


def test_every_check_is_listed_once() -> None:
    ids = [check.id for check in CHECKS]
    assert len(ids) == len(set(ids))
    assert set(ids) == emitted()


def test_every_check_has_a_test() -> None:
    tests = "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py") if p.name != "test_catalogue.py")
    # Tested by a table over all rules, or impossible to trigger in a test on any machine.
    by_table = {rule.id for rule in RULES}
    missing = {check.id for check in CHECKS if f'"{check.id}"' not in tests} - by_table
    assert missing <= {"clock.sync"}, missing


def test_the_docs_hold_the_same_table() -> None:
    text = DOCS.read_text()
    begin, end = "<!-- checks -->\n\n", "\n<!-- /checks -->"
    assert text[text.index(begin) + len(begin) : text.index(end)] == markdown(), (
        "write it anew: python -m tests.doctor.test_catalogue"
    )


def test_the_command_prints_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pdctl", "doctor", "--list", "--json"], capture_output=True, text=True, check=True
    )
    assert [entry["id"] for entry in json.loads(done.stdout)] == [check.id for check in CHECKS]


if __name__ == "__main__":
    table = re.compile(r"(<!-- checks -->\n\n).*?(\n<!-- /checks -->)", re.DOTALL)
    written = table.sub(lambda m: m[1] + markdown() + m[2], DOCS.read_text())
    DOCS.write_text(written)
