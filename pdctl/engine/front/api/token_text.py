"""Single tokens as bytes and as text, for log probabilities.

A token may be part of a character, or begin with a space that the tokenizer drops when it decodes the token alone. So
the bytes come from the vocabulary's piece, interpreted like the tokenizer's decoder: byte-level BPE (GPT-2, Qwen,
Llama 3), SentencePiece (Llama 2, Mistral, Gemma: a mark for the space, <0xE2> for a byte), BPE with a mark for the end
of a word (GPT), or WordPiece (a mark for the continuation of a word).
"""

from __future__ import annotations

import json
import re

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """Bytes and text of one tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        config = json.loads(tokenizer.to_str())
        self._added = {int(token["id"]): str(token["content"]) for token in config.get("added_tokens", [])}
        steps = _steps(config.get("decoder"))
        kinds = {step.get("type") for step in steps}
        self._bytes_of = _byte_alphabet() if "ByteLevel" in kinds else {}
        self._has_byte_pieces = "ByteFallback" in kinds
        self._blank = _blank_mark(steps)
        self._end_of_word = _mark(steps, "BPEDecoder", "suffix", "</w>")
        self._goes_on = _mark(steps, "WordPiece", "prefix", "##")

    def bytes_of(self, token_id: int) -> bytes:
        """A token's bytes; b"" for an id without a token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece: str | None = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._bytes_of and all(letter in self._bytes_of for letter in piece):
            return bytes(self._bytes_of[letter] for letter in piece)
        if self._has_byte_pieces and (found := _BYTE.fullmatch(piece)):
            return bytes([int(found[1], 16)])
        if self._blank:
            return piece.replace(self._blank, " ").encode()
        if self._end_of_word:
            return piece.replace(self._end_of_word, " ").encode()
        if self._goes_on:
            return (piece.removeprefix(self._goes_on) if piece.startswith(self._goes_on) else f" {piece}").encode()
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()


def text_of(data: bytes, chat: bool) -> str:
    """A token's bytes in OpenAI's format: text, or escapes if they are not valid text (marked in completions)."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        escapes = "".join(f"\\x{byte:02x}" for byte in data)
        return escapes if chat else f"bytes:{escapes}"


def _steps(decoder: object) -> list[dict[str, object]]:
    """A decoder's steps, with sequences flattened."""
    if not isinstance(decoder, dict):
        return []
    inner = decoder.get("decoders")
    if isinstance(inner, list):
        return [step for one in inner for step in _steps(one)]
    return [decoder]


def _blank_mark(steps: list[dict[str, object]]) -> str:
    """The character that represents a space in the vocabulary, or ""."""
    for step in steps:
        if step.get("type") == "Metaspace":
            return str(step.get("replacement", "\u2581"))
        pattern = step.get("pattern")
        if step.get("type") == "Replace" and step.get("content") == " " and isinstance(pattern, dict):
            return str(pattern.get("String", ""))
    return ""


def _mark(steps: list[dict[str, object]], kind: str, name: str, usual: str) -> str:
    """The mark that a decoder of this kind uses for words; "" if there is none."""
    return next((str(step.get(name, usual)) for step in steps if step.get("type") == kind), "")


def _byte_alphabet() -> dict[str, int]:
    """The characters of byte-level BPE (GPT-2's bytes_to_unicode) and their bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
