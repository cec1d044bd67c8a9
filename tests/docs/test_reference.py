"""The generated reference pages are up to date and complete."""

from __future__ import annotations

import pytest

from pdctl.topology.meanings import ABOUT, MEANINGS
from pdctl.topology.schema import LISTS, TABLES
from tests.docs import reference


@pytest.mark.parametrize("name", reference.PAGES)
def test_pages_are_up_to_date(name: str) -> None:
    made = reference.PAGES[name]()
    assert (reference.REFERENCE / name).read_text() == made, "write it again with: scripts/docs reference"


def test_every_key_has_a_meaning_and_no_meaning_is_left_over() -> None:
    schema = {name: set(keys) for name, keys in {**TABLES, **LISTS}.items()}
    assert {name: set(keys) for name, keys in MEANINGS.items()} == schema, "see pdctl/topology/meanings.py"
    assert set(ABOUT) == set(schema)
    assert all(meaning.text for keys in MEANINGS.values() for meaning in keys.values())


def test_types_and_defaults_come_from_the_schema() -> None:
    page = reference.topology_page()
    assert "| `max_model_len` | a whole number from 16 to 1048576 | `2048` |" in page
    assert "| `backend` | `auto` or `cuda_ipc` or `shm` or `mooncake` or `nixl` | `auto` |" in page
    assert "| `stop_signals` | a list of one or more of: SIGHUP" in page
    assert '| `["SIGTERM"]` |' in page


def test_every_command_and_option_is_listed() -> None:
    page = reference.commands_page()
    assert "## pdctl up\n" in page
    assert "### pdctl bench serve\n" in page
    assert "| `-d, --detach` | Run in the background" in page
    assert "`-h, --help`" not in page, "each command has it"
