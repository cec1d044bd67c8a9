"""Tool calls in a chat's output, one module per family of models that write them in the same way.

A module is loaded when its family is chosen: by `tool_parser` in the topology, or from the model's chat template. Each
has an object FAMILY, see `Family`.
"""

from __future__ import annotations

import importlib
from enum import Enum, auto
from typing import cast

from pdctl.engine.front.api.parsers.tool_calls.calls import ToolCall, ToolText, joined, whole_calls
from pdctl.engine.front.api.parsers.tool_calls.family import Family, PlainText
from pdctl.engine.front.api.parsers.tool_calls.forced import ForcedCall
from pdctl.names.parsers import TOOL_FAMILIES

__all__ = [
    "Family", "PlainText", "ToolCall", "ToolFormat", "ToolText", "family", "family_of_template", "joined",
    "tool_text", "whole_calls",
]  # fmt: skip

# The family of a template that no family recognizes.
_USUAL = "hermes"


class ToolFormat(Enum):
    """Where calls are in the output. Free: among text, in the family's form; forced: the output is one call, as JSON
    that a grammar enforces, whatever the family."""

    NONE = auto()
    FREE = auto()
    FORCED = auto()


def family(name: str) -> Family:
    """The family of this name."""
    assert name in TOOL_FAMILIES, name
    return cast(Family, importlib.import_module(f"{__name__}.{name}").FAMILY)


def family_of_template(template: str) -> Family:
    """The family whose calls a chat template describes."""
    found = (family(name) for name in TOOL_FAMILIES)
    return next((one for one in found if one.recognizes(template)), family(_USUAL))


def tool_text(
    chosen: Family | None, form: ToolFormat, request_id: str, tools: list[dict[str, object]] | None = None
) -> ToolText:
    """The parser of one answer. `tools`: the request's, for families that write arguments without types."""
    if form is ToolFormat.FORCED:
        return ForcedCall((chosen or family(_USUAL)).namer(request_id))
    if form is ToolFormat.NONE or chosen is None:
        return PlainText()
    return chosen.parser(chosen.namer(request_id), tools or [])
