"""sample:tiny-qwen3: a Qwen3 with one million random weights, equal on every machine. For tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pdctl.engine.samples import Progress

_VOCAB = 384
_SEED = 2
# Initial random weights give nearly flat logits; scaled ones give varied greedy output with wide margins.
_SCALE, _HEAD_SCALE = 6.0, 5.0


def build(folder: Path, progress: Progress) -> None:
    """Write config, weights and tokenizer into `folder`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=_VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=_VOCAB - 1,
        pad_token_id=None,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(_SEED)
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1 and "embed" not in name:
                weights.mul_(_HEAD_SCALE if "lm_head" in name else _SCALE)
        # The end token is never chosen by chance, so outputs have the length that tests request.
        model.lm_head.weight[_VOCAB - 1].zero_()
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    progress("tiny-qwen3", 1.0)


def build_chat(folder: Path, progress: Progress) -> None:
    """The same model with a chat template that supports tools."""
    build(folder, progress)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)


_TEMPLATE = """\
{%- if tools %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif -%}
{%- for message in messages -%}
[{{ message.role }}] {{ message.content or '' }}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}
{% endfor -%}
{%- if add_generation_prompt %}[assistant] {% endif -%}
"""


def _tokenizer() -> Tokenizer:
    """One token per byte, and words for the ids above, so that every id decodes to text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [AddedToken(f"<{index}>", normalized=False) for index in range(len(vocab), _VOCAB - 1)]
    tokenizer.add_tokens(words)
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer
