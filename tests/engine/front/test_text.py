from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.engine.front.api.text import NoChatTemplate, OutputText, TextCodec, render_chat


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> TextCodec:
    return TextCodec(tiny_model)


def pieces(codec: TextCodec, ids: list[int], stops: list[str]) -> tuple[list[str], bool]:
    out = OutputText(codec.tokenizer, codec.encode("prompt"), stops)
    shown = []
    for token_id in ids:
        text, stopped = out.push(token_id)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, out.flush()], False


@settings(max_examples=60)
@given(text=st.text(max_size=40))
def test_pieces_make_up_the_text_and_never_half_a_character(codec: TextCodec, text: str) -> None:
    ids = codec.encode(text)
    shown, _ = pieces(codec, ids, [])
    assert "".join(shown) == codec.tokenizer.decode(ids)
    assert "�" not in "".join(shown[:-1]) or "�" in text


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stopped"),
    [
        ("hello END more", ["END"], "hello ", True),
        ("hello EN more", ["END"], "hello EN more", False),
        ("hello EN", ["END"], "hello EN", False),
        ("aab", ["ab"], "a", True),
        ("one two three", ["three", "two"], "one ", True),
        ("über ß", ["ß"], "über ", True),
    ],
)
def test_stop_strings_never_show(codec: TextCodec, text: str, stops: list[str], expected: str, stopped: bool) -> None:
    shown, ended = pieces(codec, codec.encode(text), stops)
    assert ("".join(shown), ended) == (expected, stopped)


@pytest.mark.parametrize(
    ("text", "stops", "stop"),
    [("one two three", ["three", "two"], "two"), ("aab", ["b", "ab"], "ab"), ("one", ["two"], None), ("one", [], None)],
)
def test_the_stop_string_that_was_reached(codec: TextCodec, text: str, stops: list[str], stop: str | None) -> None:
    out = OutputText(codec.tokenizer, codec.encode("prompt"), stops)
    assert any(out.push(token_id)[1] for token_id in codec.encode(text)) == (stop is not None)
    assert out.stop == stop


@settings(max_examples=40)
@given(text=st.text(min_size=2, max_size=30), cut=st.integers(1, 29), stop=st.sampled_from([[], ["ab"], ["é"]]))
def test_a_resumed_text_goes_on_where_it_was(codec: TextCodec, text: str, cut: int, stop: list[str]) -> None:
    """After replaying the first tokens, another engine shows the same text as this one would."""
    ids = codec.encode(text)
    whole, _ = pieces(codec, ids, stop)
    cut = min(cut, len(ids), max(1, len(whole) - 1))
    out = OutputText(codec.tokenizer, codec.encode("prompt"), stop)
    for token_id in ids[:cut]:
        if out.push(token_id)[1]:
            return
    rest = []
    for token_id in ids[cut:]:
        shown, stopped = out.push(token_id)
        rest.append(shown)
        if stopped:
            break
    else:
        rest.append(out.flush())
    assert "".join(whole[:cut]) + "".join(rest) == "".join(whole)


def test_a_base_model_has_no_chat(codec: TextCodec) -> None:
    with pytest.raises(NoChatTemplate, match="base model"):
        codec.encode_chat([{"role": "user", "content": "hi"}], 0.0)


def test_chat_templates_render_with_their_helpers() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no bad role') }}{% endif %}"
        "[{{ m.role }}]{{ m.content | tojson }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    text = render_chat(template, [{"role": "user", "content": "é"}], {"bos_token": "<s>"}, 0.0)
    assert text == '<s>[user]"é"[assistant]'
    with pytest.raises(ValueError, match="no bad role"):
        render_chat(template, [{"role": "bad", "content": ""}], {"bos_token": ""}, 0.0)


def test_a_templates_clock_is_the_requests() -> None:
    assert render_chat("{{ strftime_now('%Y') }}", [], {}, 40_000_000.0) == "1971"


CLOSING = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"


@pytest.mark.parametrize("final", ["So it", " So it", "So it ", "user", "s", ">", "</s>", "assistant"])
def test_a_conversation_can_be_left_open(tmp_path: Path, codec: TextCodec, final: str) -> None:
    codec.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(CLOSING)
    chat = TextCodec(tmp_path)
    messages: list[dict[str, object]] = [{"role": "user", "content": "user"}, {"role": "assistant", "content": final}]
    given: dict[str, object] = {"add_generation_prompt": False}
    open_ids = chat.encode_chat(messages, 0.0, variables=given, continue_final=True)
    assert chat.decode(open_ids) == f"<user>user</s><assistant>{final.strip()}"
    assert chat.decode(chat.encode_chat(messages, 0.0, variables=given)) == chat.decode(open_ids) + "</s>"
    with pytest.raises(ValueError, match="last message"):
        chat.encode_chat([{"role": "user", "content": ""}], 0.0, variables=given, continue_final=True)


def test_words_are_forbidden_at_the_beginning_and_after_a_blank(codec: TextCodec) -> None:
    assert codec.forbidden(["ab"]) == [codec.encode("ab", special=False)]
    for ids in codec.forbidden(["a", "b"]):
        assert codec.decode(ids).strip() in ("a", "b")


def test_offsets_are_places_in_the_text(codec: TextCodec) -> None:
    ids = codec.encode("a\u00e9b", special=False)
    assert codec.shown(ids) == "a\u00e9b"
    assert codec.offsets(ids) == [0, 1, 1, 2]


def test_a_template_cannot_reach_python() -> None:
    with pytest.raises(ValueError, match="refuses"):
        render_chat("{{ ''.__class__.__mro__[1].__subclasses__() }}", [], {}, 0.0)


@settings(max_examples=200)
@given(tail=st.lists(st.integers(0, 383), max_size=8), ids=st.lists(st.integers(0, 383), max_size=24))
def test_any_bytes_at_all_make_text(codec: TextCodec, tail: list[int], ids: list[int]) -> None:
    out = OutputText(codec.tokenizer, tail, [])
    after = codec.tokenizer.encode("after", add_special_tokens=False).ids
    shown = "".join(out.push(token_id)[0] for token_id in [*ids, *after]) + out.flush()
    assert shown.endswith("after"), "whatever came before, what comes then is shown"


def test_a_prompt_that_ends_within_a_character(codec: TextCodec) -> None:
    head, *rest = codec.tokenizer.encode("€", add_special_tokens=False).ids
    assert rest, "the sample's tokens are bytes"
    out = OutputText(codec.tokenizer, [head], [])
    shown = "".join(out.push(token_id)[0] for token_id in [*rest, *codec.tokenizer.encode("abc").ids]) + out.flush()
    assert shown.endswith("abc")


def test_a_text_far_beyond_the_context_is_refused_before_it_is_encoded(codec: TextCodec) -> None:
    assert len(codec.encode("a" * 70_000)) > 1000
    with pytest.raises(ValueError, match="context is 10 tokens"):
        codec.encode("a" * 70_000, max_tokens=10)
    assert codec.encode("a b c", max_tokens=1)


def test_texts_that_can_never_fit_are_refused_before_they_are_encoded(
    codec: TextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "word " * 3_000_000
    monkeypatch.setattr(codec, "tokenizer", None)  # asking it would fail
    with pytest.raises(ValueError, match="context is"):
        codec.encode(long, 2048)
    for characters in (2_000_000, 2_200_000):
        with pytest.raises(ValueError, match="context is"):
            codec.check_length(characters, 131_072)


def test_chats_are_measured_before_the_template(codec: TextCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_templates", {"default": "{{ raise_exception('the template was asked') }}"})
    long: list[dict[str, object]] = [{"role": "user", "content": [{"type": "text", "text": "x" * 400_000}]}] * 8
    with pytest.raises(ValueError, match="characters"):
        codec.encode_chat(long, 0.0, None, 2048)
    with pytest.raises(ValueError, match="characters"):
        codec.encode_chat([{"role": "user", "content": "x"}], 0.0, [{"description": "y" * 3_000_000}], 2048)


def test_a_model_may_have_another_template_for_tools(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    codec = TextCodec(tmp_path)
    messages: list[dict[str, object]] = [{"role": "user", "content": "x"}]
    assert codec.decode(codec.encode_chat(messages, 0.0)) == "plain"
    assert codec.decode(codec.encode_chat(messages, 0.0, [{"type": "function"}])) == codec.template == "tools"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    assert TextCodec(tmp_path).template == "plain"
