"""The parsers of an engine's answers, chosen when it starts: for tool calls and for reasoning."""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.engine.front.api.parsers.reasoning import MISTRAL, THINK, Marks, marks_of_template
from pdctl.engine.front.api.parsers.tool_calls import Family, family, family_of_template
from pdctl.names.parsers import AUTO, NONE

_MARKS = {"think": THINK, "mistral": MISTRAL}


@dataclass(frozen=True, slots=True)
class Parsers:
    """`family`: None if tool calls are left in the text; `marks`: None if reasoning is."""

    family: Family | None = None
    marks: Marks | None = None


def choose(tool_parser: str, reasoning_parser: str, template: str) -> Parsers:
    """The parsers of these names; "auto": as the chat template needs them."""
    if tool_parser == AUTO:
        chosen: Family | None = family_of_template(template)
    else:
        chosen = None if tool_parser == NONE else family(tool_parser)
    marks = marks_of_template(template) if reasoning_parser == AUTO else _MARKS.get(reasoning_parser)
    return Parsers(chosen, marks)
