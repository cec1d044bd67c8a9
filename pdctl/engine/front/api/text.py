"""Conversion between text and token ids: tokenizer, chat template, and output text that grows token by token."""

from __future__ import annotations

import json
from datetime import datetime
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pdctl.engine.front.api.token_text import TokenText

Messages = list[dict[str, object]]

# Shorter texts are always encoded, even if the context is shorter: this takes a few milliseconds.
_LEAST_REFUSED = 65_536
# No text has this many characters per token on average, although single tokens may be long. Encoding a million
# characters takes about a second.
_MOST_PER_TOKEN, _MOST_ANYWAY = 16, 1 << 20


# The names of chat templates, if a model has several.
_DEFAULT, _WITH_TOOLS = "default", "tool_use"


class NoChatTemplate(Exception):
    """The model has no chat template: it is a base model that completes text."""


class TextCodec:
    """A model directory's tokenizer and, if it has one, its chat template."""

    def __init__(self, model: Path) -> None:
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.token_text = TokenText(self.tokenizer)
        self._templates = _chat_templates(model)
        self._special_ids = _special_ids(self.tokenizer)
        self._specials = _special_tokens(model)

    @property
    def template(self) -> str:
        """The chat template for requests with tools; "" if there is none."""
        return self._template_for(has_tools=True)

    def _template_for(self, has_tools: bool) -> str:
        templates = self._templates
        return (templates.get(_WITH_TOOLS) if has_tools else None) or templates.get(_DEFAULT, "")

    def special_ids(self, texts: tuple[str, ...]) -> dict[int, str]:
        """The texts among these that are special tokens, which answers do not show, by their ids."""
        return {self._special_ids[text]: text for text in texts if text in self._special_ids}

    @cached_property
    def _longest_token(self) -> int:
        """Length of the longest token in characters."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    def encode(self, text: str, max_tokens: int | None = None, special: bool = True) -> list[int]:
        """Token ids with the special tokens that the tokenizer adds, such as <bos>.

        Raises ValueError, without encoding, for a text that cannot fit into `max_tokens`.
        """
        if max_tokens is not None:
            self.check_length(len(text), max_tokens)
        # encode_batch releases the GIL, so other threads can run.
        ids: list[int] = self.tokenizer.encode_batch([text], add_special_tokens=special)[0].ids
        return ids

    def check_length(self, characters: int, max_tokens: int) -> None:
        """Raise ValueError if the text is too long for `max_tokens` whatever the tokenizer."""
        longest = max_tokens * self._longest_token
        likely = max(max_tokens * _MOST_PER_TOKEN, _MOST_ANYWAY)
        if characters > max(min(longest, likely), _LEAST_REFUSED):
            message = f"this model's context is {max_tokens} tokens, prompt and output together; the prompt alone has "
            raise ValueError(f"{message}{max_tokens + 1} or more ({characters} characters)")

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special ones included."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def shown(self, token_ids: list[int]) -> str:
        """The text of token ids as in an answer, without special tokens."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def offsets(self, token_ids: list[int]) -> list[int]:
        """The character offset of each token in the text of `shown`."""
        text, found = OutputText(self.tokenizer, [], []), []
        for token_id in token_ids:
            found.append(text.length)
            text.push(token_id)
        return found

    def knows(self, token_id: int) -> bool:
        """Whether the tokenizer has this token. Models may have more rows than tokens."""
        return self.tokenizer.id_to_token(token_id) is not None

    def forbidden(self, words: list[str]) -> list[list[int]]:
        """Token sequences of these words, at the beginning of a text and after a space, as in vLLM."""
        found: list[list[int]] = []
        for word in words:
            plain, spaced = (self.encode(blank + word.lstrip(), special=False) for blank in ("", " "))
            found += [plain] if plain else []
            if spaced and plain and spaced[0] != plain[0] and len(spaced) == len(plain):
                found.append(spaced)
        return found

    def encode_chat(
        self,
        messages: Messages,
        at: float,
        tools: Messages | None = None,
        max_tokens: int | None = None,
        variables: dict[str, object] | None = None,
        continue_final: bool = False,
    ) -> list[int]:
        """Token ids of a conversation up to the assistant's answer. `at`: the current time for the template.

        `continue_final`: the last message stays open, and the answer continues it. Raises NoChatTemplate, ValueError
        with the template's error message, or errors as in `encode`.
        """
        template = self._template_for(bool(tools))
        if not template:
            raise NoChatTemplate("this model has no chat template: it is a base model; use /v1/completions")
        if max_tokens is not None:
            # Check before rendering: the template may take long for messages that are then refused.
            self.check_length(_characters(messages) + _characters(tools or []), max_tokens)
        shown = _marked(messages) if continue_final else messages
        text = render_chat(template, shown, self._specials, at, tools, variables)
        if continue_final:
            text = _left_open(text)
        return self.encode(text, max_tokens, special=False)


# Marks the end of the last message, as in transformers: the same text may occur elsewhere in the template's output.
# The trailing space reveals a template that strips messages.
_MARK = "PDCTL_END_OF_THE_LAST_MESSAGE "


def _marked(messages: Messages) -> Messages:
    """The messages with the mark at the end of the last one. Raises ValueError if it has no text."""
    final = messages[-1].get("content")
    if not isinstance(final, str) or not final.strip():
        raise ValueError("continue_final_message: the last message has no text to continue")
    return [*messages[:-1], {**messages[-1], "content": final + _MARK}]


def _left_open(text: str) -> str:
    """A rendered conversation up to the end of its last message. Raises ValueError if the template omits it."""
    at = text.rfind(_MARK.strip())
    if at < 0:
        raise ValueError("continue_final_message: the chat template does not show the last message")
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _characters(value: object) -> int:
    """Total characters of all strings in a JSON value."""
    waiting, found = [value], 0
    while waiting:
        match waiting.pop():
            case str() as text:
                found += len(text)
            case list() as items:
                waiting += items
            case dict() as members:
                waiting += [*members.keys(), *members.values()]
    return found


def render_chat(
    template: str,
    messages: Messages,
    specials: dict[str, str],
    at: float,
    tools: Messages | None = None,
    variables: dict[str, object] | None = None,
) -> str:
    """Render a Hugging Face chat template, with the helpers such templates expect.

    `at` is the template's current time in seconds since 1970: every engine that a request visits must render the same
    prompt.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.fromtimestamp(at).astimezone().strftime(pattern)
    try:
        given = {**specials, "add_generation_prompt": True, **(variables or {}), "messages": messages, "tools": tools}
        return environment.from_string(template).render(given)
    except (TemplateError, TypeError) as failure:
        raise ValueError(f"the model's chat template refuses these messages: {failure}") from failure


class OutputText:
    """Output text as tokens arrive: never a partial character, never past a stop string.

    Text that might become a stop string is held back until it cannot. `marks`: special tokens that are text
    nevertheless, by their ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tail: list[int],
        stops: list[str],
        include_stop: bool = False,
        marks: dict[int, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._include_stop = include_stop
        self._marks = marks or {}
        self._stream = DecodeStream(ids=prompt_tail, skip_special_tokens=True)
        self._pending: list[int] = []
        self._held = ""
        self.length = 0  # characters so far, including those held back
        self.stop: str | None = None  # the stop string that was reached

    def push(self, token_id: int) -> tuple[str, bool]:
        """New text that can be shown, and whether a stop string was reached."""
        mark = self._marks.get(token_id)
        if mark is not None and (rest := self._rest()):
            # Bytes of a character that is never completed come before the mark.
            mark = rest + mark
            self._stream = DecodeStream(ids=[], skip_special_tokens=True)
        self._pending.append(token_id)
        piece = self._decoded(token_id)
        piece = piece if mark is None else mark + (piece or "")
        if piece is None:
            return "", False
        self._pending.clear()
        self.length += len(piece)
        return self._show(piece)

    def _decoded(self, token_id: int) -> str | None:
        try:
            piece: str | None = self._stream.step(self._tokenizer, token_id)
            return piece
        except Exception as failure:
            # The library raises a bare Exception if more bytes change text that it returned before: the prompt ends
            # within a character, or bytes are not UTF-8. Then the pending tokens are decoded without earlier ones.
            if type(failure) is not Exception:
                raise
        self._stream = DecodeStream(ids=[], skip_special_tokens=True)
        rest: str = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        return rest

    def flush(self) -> str:
        """The remaining text when the output ends without a stop string."""
        text, self._held = self._held + self._rest(), ""
        return text

    def _rest(self) -> str:
        """Take the text of the pending tokens."""
        rest: str = self._tokenizer.decode(self._pending, skip_special_tokens=True) if self._pending else ""
        self._pending.clear()
        return rest

    def _show(self, piece: str) -> tuple[str, bool]:
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(at, len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            at, length, self.stop = min(found)
            return text[: at + length if self._include_stop else at], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of special tokens, by their text."""
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in added.items() if token.special}


def _chat_templates(model: Path) -> dict[str, str]:
    """Chat templates by name. Most models have only the default one; some, as Hermes 3, have another for tools."""
    separate = model / "chat_template.jinja"
    if separate.is_file():
        return {_DEFAULT: separate.read_text(encoding="utf-8")}
    found = _tokenizer_config(model).get("chat_template")
    if isinstance(found, str):
        return {_DEFAULT: found}
    named = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return {str(one.get("name")): str(one.get("template", "")) for one in named}


def _special_tokens(model: Path) -> dict[str, str]:
    """bos_token and similar ones; each is a string or an object with `content`."""
    specials = {}
    for name, value in _tokenizer_config(model).items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            specials[name] = content
    return specials


def _tokenizer_config(model: Path) -> dict[str, object]:
    path = model / "tokenizer_config.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
