"""The names of parsers of a model's output. The topology and the builtin engine use this module.

To add a family of tool calls: a name here, and a module of its name in pdctl/engine/front/api/parsers/tool_calls/.
"""

from __future__ import annotations

AUTO, NONE = "auto", "none"
# In the order in which a chat template is compared with them: the first that recognizes it is chosen.
TOOL_FAMILIES = ("qwen3_coder", "hermes", "mistral", "llama3")
TOOL_PARSERS = (AUTO, *sorted(TOOL_FAMILIES), NONE)
REASONING_PARSERS = (AUTO, "mistral", "think", NONE)
