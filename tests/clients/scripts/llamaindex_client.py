"""LlamaIndex's OpenAILike."""

from __future__ import annotations

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients.scripts.common import API_KEY, BASE_URL, MODEL, Animal, done

COMMON = {"model": MODEL, "api_base": BASE_URL, "api_key": API_KEY, "is_chat_model": True, "max_retries": 0}
llm = OpenAILike(**COMMON, max_tokens=12, temperature=0)
answer = llm.chat([ChatMessage(role="user", content="hello")])
done("chat", answer.message.content)
streamed = "".join(part.delta or "" for part in llm.stream_chat([ChatMessage(role="user", content="hello")]))
assert streamed == answer.message.content
done("stream", "equal")
caller = OpenAILike(**COMMON, max_tokens=200, is_function_calling_model=True)


def weigh(kind: str, legs: int) -> str:
    """Weigh it."""
    return f"{kind} {legs}"


tool = FunctionTool.from_defaults(weigh, fn_schema=Animal)
called = caller.chat_with_tools([tool], user_msg="hello", tool_required=True)
calls = caller.get_tool_calls_from_response(called)
assert calls[0].tool_name == "weigh"
done("tool", calls[0].tool_kwargs)
found = caller.as_structured_llm(Animal).chat([ChatMessage(role="user", content="hello")])
assert isinstance(found.raw, Animal)
done("structured output", found.raw)
