"""LiteLLM, through its OpenAI-compatible provider."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no price look-up over the network
import litellm

from tests.clients.scripts.common import API_KEY, BASE_URL, HELLO, MODEL, Animal, done

COMMON = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": API_KEY, "messages": HELLO, "num_retries": 0}
answer = litellm.completion(**COMMON, max_tokens=12, temperature=0)
assert answer.usage.completion_tokens == 12
done("chat", answer.choices[0].message.content)
text = "".join(
    chunk.choices[0].delta.content or ""
    for chunk in litellm.completion(**COMMON, max_tokens=12, temperature=0, stream=True)
)
assert text == answer.choices[0].message.content
done("stream", "equal")
tool = {"type": "function", "function": {"name": "weigh", "parameters": Animal.model_json_schema()}}
called = litellm.completion(**COMMON, max_tokens=200, tools=[tool], tool_choice="required").choices[0].message
Animal.model_validate_json(called.tool_calls[0].function.arguments)
done("tool", called.tool_calls[0].function.arguments)
found = litellm.completion(**COMMON, max_tokens=200, response_format=Animal).choices[0].message.content
done("structured output", Animal.model_validate_json(found))
