"""instructor, over the official client, by tools and by JSON Schema."""

from __future__ import annotations

import instructor
from openai import OpenAI

from tests.clients.scripts.common import API_KEY, BASE_URL, HELLO, MODEL, Animal, done

for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0), mode=mode)
    found = client.chat.completions.create(
        model=MODEL, messages=HELLO, response_model=Animal, max_tokens=200, max_retries=0
    )
    assert isinstance(found, Animal)
    done(mode.name, found)
