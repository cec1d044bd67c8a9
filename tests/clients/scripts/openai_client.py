"""The official client: chats, streams, tools, structured output, completions, log probabilities."""

from __future__ import annotations

import json

from openai import OpenAI, pydantic_function_tool

from tests.clients.scripts.common import API_KEY, BASE_URL, HELLO, MODEL, Animal, done

client = OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0)
chat = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12, temperature=0)
assert chat.usage
assert chat.usage.completion_tokens == 12
assert chat.system_fingerprint
done("chat", chat.choices[0].message.content)

chunks = list(
    client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.choices[0].message.content
assert len({(c.id, c.created) for c in chunks}) == 1
assert chunks[-1].usage
assert chunks[-1].usage.completion_tokens == 12
done("stream", len(chunks))

parsed = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Animal, max_tokens=200)
assert isinstance(parsed.choices[0].message.parsed, Animal)
done("structured output", parsed.choices[0].message.parsed)

tool = pydantic_function_tool(Animal)
called = client.chat.completions.create(
    model=MODEL, messages=HELLO, tools=[tool], tool_choice="required", max_tokens=200
).choices[0]
assert called.finish_reason == "tool_calls"
assert called.message.tool_calls
call = called.message.tool_calls[0]
assert call.type == "function"
Animal.model_validate_json(call.function.arguments)
done("tool", call.function)

with client.chat.completions.stream(
    model=MODEL, messages=HELLO, tools=[tool], tool_choice="required", max_tokens=200
) as stream:
    for _ in stream:
        pass
    final = stream.get_final_completion().choices[0]
assert final.message.tool_calls
assert json.loads(final.message.tool_calls[0].function.arguments)
done("streamed tool", final.message.tool_calls[0].function.arguments)

text = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=4, logprobs=5)
assert len(text.choices) == 4
logprobs = text.choices[0].logprobs
assert logprobs
assert logprobs.top_logprobs
assert len(logprobs.top_logprobs[0]) >= 5
done("completions", [c.text for c in text.choices])

response = client.responses.create(model=MODEL, input="hello", max_output_tokens=12, temperature=0)
assert response.output_text == chat.choices[0].message.content
done("response", response.output_text)
with client.responses.stream(model=MODEL, input="hello", max_output_tokens=200, text_format=Animal) as responses:
    responses.until_done()
    assert isinstance(responses.get_final_response().output_parsed, Animal)
done("streamed response, parsed", responses.get_final_response().output_parsed)
