"""Tokens as bytes for all tokenizer families: joined, they are the text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pdctl.engine.front.api.token_text import TokenText, text_of

CORPUS = ["the quick brown fox jumps over the lazy dog", "caf\u00e9 \U0001f600 na\u00efve", "  two blanks  "] * 20


def byte_level() -> Tokenizer:
    """GPT-2, Qwen, Llama 3."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def sentence_piece_bpe() -> Tokenizer:
    """Llama 2, Mistral, Phi-3: Replace, ByteFallback, Fuse, Strip."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581t", "he", "\u2581the"]
    vocab = {**bytes_, **{piece: 256 + n for n, piece in enumerate(pieces)}}
    made = Tokenizer(
        models.BPE(vocab, [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")], byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def unigram_metaspace() -> Tokenizer:
    """Gemma-like and T5-like: Metaspace."""
    vocab = [("<unk>", 0.0), *((piece, -2.0) for piece in ("\u2581", "\u2581the", *"abcdefghijklmnopqrstuvwxyz"))]
    vocab += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    made = Tokenizer(models.Unigram(vocab, 0, True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    return made


FAMILIES = {"byte-level": byte_level, "sentencepiece": sentence_piece_bpe, "metaspace": unigram_metaspace}


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = FAMILIES[request.param]()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return made


@settings(max_examples=60)
@given(text=st.text(st.sampled_from("the quickabc \u00e9\U0001f600\u4e16"), max_size=20))
def test_joined_tokens_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    joined = b"".join(TokenText(tokenizer).bytes_of(token_id) for token_id in ids)
    assert joined.removeprefix(b" " if not text.startswith(" ") else b"  ").strip() == text.encode().strip()
    if text and not text.startswith(" "):
        assert joined.decode().lstrip(" ") == text


def test_parts_of_characters_keep_their_bytes_and_differ(tokenizer: Tokenizer) -> None:
    of = TokenText(tokenizer)
    ids = tokenizer.encode("\U0001f600", add_special_tokens=False).ids
    parts = [of.bytes_of(token_id) for token_id in ids]
    assert b"".join(parts).strip() == "\U0001f600".encode()
    shown = [text_of(part, chat=False) for part in parts if part != b" "]
    assert len(set(shown)) == len(shown)
    assert all(word.startswith("bytes:\\x") for word in shown)
    assert [text_of(part, chat=True) for part in parts if part != b" "] == [
        word.removeprefix("bytes:") for word in shown
    ]


def test_every_token_of_a_vocabulary_has_a_text_of_its_own(tokenizer: Tokenizer) -> None:
    of = TokenText(tokenizer)
    known = [of.bytes_of(token_id) for token_id in tokenizer.get_vocab().values()]
    texts = {text_of(data, chat=False) for data in known}
    # Only a byte piece and the letter with that byte have the same text.
    assert len(known) - len(texts) <= 30
    end = tokenizer.token_to_id("<end>")
    assert end is not None
    assert of.bytes_of(end) == b"<end>"
    assert of.bytes_of(10_000) == b""


def test_blanks_before_words_stay(tokenizer: Tokenizer) -> None:
    of = TokenText(tokenizer)
    ids = tokenizer.encode("quick the", add_special_tokens=False).ids
    assert b"".join(map(of.bytes_of, ids)).endswith(b" the")


def bpe_with_word_ends() -> Tokenizer:
    """GPT, XLM: a mark ends each word."""
    made = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def word_piece() -> Tokenizer:
    """BERT and its derivatives."""
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "play": 2, "##ing": 3, "dog": 4, "##s": 5}))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    return made


@pytest.mark.parametrize(
    ("made", "text"), [(bpe_with_word_ends, "the lazy dog jumps"), (word_piece, "the playing dogs")]
)
def test_words_that_are_marked_keep_their_blanks(made: Callable[[], Tokenizer], text: str) -> None:
    found = made()
    ids = found.encode(text).ids
    assert len(ids) > len(text.split())
    assert b"".join(map(TokenText(found).bytes_of, ids)).decode().strip() == text
