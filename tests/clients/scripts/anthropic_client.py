"""Anthropic's official client: messages, streams, tools, token counts, errors."""

from __future__ import annotations

import os

import anthropic

from tests.clients.scripts.common import API_KEY, BASE_URL, HELLO, MODEL, Animal, done

os.environ.pop("ANTHROPIC_AUTH_TOKEN", None)
client = anthropic.Anthropic(base_url=BASE_URL.removesuffix("/v1"), api_key=API_KEY, max_retries=0)
COMMON = {"model": MODEL, "messages": HELLO, "extra_body": {"temperature": 0, "seed": 1}}


def counts(usage: anthropic.types.Usage) -> tuple[int, int]:
    """Tokens in and out. A prompt's tokens whose KV was there are counted apart."""
    return usage.input_tokens + (usage.cache_read_input_tokens or 0), usage.output_tokens


whole = client.messages.create(**COMMON, max_tokens=12)
assert whole._request_id
assert whole.usage.output_tokens == 12
assert whole.stop_reason == "max_tokens"
done("message", whole.content[0].text)

with client.messages.stream(**COMMON, max_tokens=12) as stream:
    assert "".join(stream.text_stream) == whole.content[0].text
    final = stream.get_final_message()
assert (final.stop_reason, counts(final.usage)) == (whole.stop_reason, counts(whole.usage))
assert final.usage.cache_read_input_tokens, "the same prompt was there already"
done("stream", "equal")

counted = client.messages.count_tokens(model=MODEL, messages=HELLO)
assert counted.input_tokens == counts(whole.usage)[0]
done("token count", counted.input_tokens)

stop = whole.content[0].text[6:8]
stopped = client.messages.create(**COMMON, max_tokens=12, stop_sequences=[stop])
assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
done("stop sequence", stop)

tool = {"name": "weigh", "input_schema": Animal.model_json_schema()}
TOOLS = {**COMMON, "max_tokens": 200, "tools": [tool], "tool_choice": {"type": "any"}}
used = client.messages.create(**TOOLS)
[block] = used.content
assert (used.stop_reason, block.type) == ("tool_use", "tool_use")
done("tool", Animal.model_validate(block.input))
with client.messages.stream(**TOOLS) as stream:
    [streamed] = stream.get_final_message().content
assert streamed.input == block.input
done("streamed tool", streamed.input)

result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "heavy"}]}
turns = [*HELLO, {"role": "assistant", "content": used.content}, result]
then = client.messages.create(model=MODEL, messages=turns, tools=[tool], max_tokens=4)
assert then.usage.output_tokens == 4
done("tool result", then.content)

for error, fields in (
    (anthropic.NotFoundError, {"model": "other"}),
    (anthropic.BadRequestError, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
):
    try:
        client.messages.create(**{"model": MODEL, "messages": HELLO, "max_tokens": 4, **fields})
    except error as failure:
        done(error.__name__, failure)
    else:
        raise AssertionError(f"no {error.__name__}")
