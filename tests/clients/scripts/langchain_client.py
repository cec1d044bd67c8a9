"""LangChain's ChatOpenAI."""

from __future__ import annotations

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.clients.scripts.common import API_KEY, BASE_URL, MODEL, Animal, done

llm = ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key=API_KEY, max_tokens=12, temperature=0, max_retries=0)
answer = llm.invoke("hello")
assert answer.usage_metadata["output_tokens"] == 12
done("chat", answer.content)
assert "".join(chunk.content for chunk in llm.stream("hello")) == answer.content
done("stream", "equal")


@tool(args_schema=Animal)  # type: ignore[untyped-decorator]  # LangChain is only in .venv-clients
def weigh(kind: str, legs: int) -> str:
    """Weigh it."""
    return f"{kind} {legs}"


long = ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key=API_KEY, max_tokens=200, max_retries=0)
called = long.bind_tools([weigh], tool_choice="weigh").invoke("hello")
assert called.tool_calls[0]["name"] == "weigh"
done("tool", weigh.invoke(called.tool_calls[0]["args"]))
for method in ("json_schema", "function_calling"):
    found = long.with_structured_output(Animal, method=method).invoke("hello")
    assert isinstance(found, Animal)
    done(f"structured output ({method})", found)
