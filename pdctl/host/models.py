"""Locate a topology's model on this host, without loading it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

# The folder name contains the version of the conversion, so that a changed one never reuses an old result.
SAMPLES = {"gemma-3-270m": "gemma-3-270m-r1", "tiny-qwen3": "tiny-qwen3-r1", "tiny-chat": "tiny-chat-r2"}
SAMPLE_PREFIX = "sample:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """A model's location. `path`: what an engine loads; `ready`: whether it exists already."""

    spec: str
    path: str
    ready: bool


class UnknownModel(ValueError):
    """The spec is neither a sample, nor a directory, nor a Hub id."""


def locate_model(spec: str, cache_root: Path, base: Path = Path()) -> ModelLocation:
    """Resolve `sample:NAME`, a local Hugging Face directory, or a Hub id `owner/name`.

    Relative directories are relative to `base`. Raises UnknownModel with a message that says what was tried.
    """
    if spec.startswith(SAMPLE_PREFIX):
        return _sample(spec, cache_root)
    directory = (base / Path(spec).expanduser()).resolve()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UnknownModel(f"{directory} is not a Hugging Face model directory: it has no config.json")
        return ModelLocation(spec, str(directory), ready=True)
    if _HUB_ID.fullmatch(spec) and not spec.startswith((".", "/")):
        return ModelLocation(spec, spec, ready=False)
    raise UnknownModel(f"model {spec!r} was not found: no directory {directory}, and not a Hub id (owner/name)")


def _sample(spec: str, cache_root: Path) -> ModelLocation:
    name = spec.removeprefix(SAMPLE_PREFIX)
    if name not in SAMPLES:
        raise UnknownModel(f"unknown sample model {spec!r}; known: {', '.join(SAMPLE_PREFIX + s for s in SAMPLES)}")
    path = cache_root / "models" / SAMPLES[name]
    return ModelLocation(spec, str(path), ready=(path / "config.json").is_file())


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model, from its config.json and its files. `kv_token_bytes`: K and V of one token in all layers, at
    two bytes per element; `weight_bytes`: at two bytes per element; `positions`: maximum positions, 0 if unknown."""

    kv_token_bytes: int
    weight_bytes: int
    positions: int


def read_shape(directory: Path) -> ModelShape | None:
    """The shape of a local model; None if its config.json lacks the values."""
    try:
        config = json.loads((directory / "config.json").read_text())
        config = config.get("text_config") or config
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        layers = int(config["num_hidden_layers"])
        positions = int(config.get("max_position_embeddings") or 0)
        item_bytes = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
        size = sum(path.stat().st_size for path in weight_files(directory))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        return None
    return ModelShape(2 * 2 * layers * kv_heads * head_dim, size * 2 // item_bytes, positions)


def cannot_split(directory: Path, ranks: int) -> str:
    """Why so many devices cannot share the attention heads of a local model; "" if they can, or if it cannot be told
    from its config.json."""
    try:
        config = json.loads((directory / "config.json").read_text())
        config = config.get("text_config") or config
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        unequal = heads % ranks or (kv_heads % ranks and ranks % kv_heads)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        return ""
    return f"its {heads} attention heads and {kv_heads} KV heads cannot be shared by {ranks}" if unequal else ""


def cannot_stage(directory: Path, stages: int) -> str:
    """Why so many stages cannot share the layers of a local model; "" if they can, or if it cannot be told from its
    config.json."""
    try:
        config = json.loads((directory / "config.json").read_text())
        layers = int((config.get("text_config") or config)["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f"its {layers} layers cannot be shared by {stages}" if layers < stages else ""


def weight_files(directory: Path) -> list[Path]:
    """Files with weights. Some repositories have the same weights twice: a single file comes first, then the files in
    the index, then any."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    named = _named(directory)
    return [directory / name for name in named if (directory / name).is_file()] or [
        path for path in sorted(directory.glob("*.safetensors")) if path.is_file()
    ]


def missing_shards(directory: Path) -> list[str]:
    """Files in the index that do not exist, unless there is a single file with all weights."""
    if (directory / "model.safetensors").is_file():
        return []
    return [name for name in _named(directory) if not (directory / name).is_file()]


def _named(directory: Path) -> list[str]:
    try:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        return sorted({str(name) for name in index["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def fingerprint(path: Path) -> str:
    """A digest that identifies a model: its config, and for each weight file the size and three samples."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for position in (0, size // 2, max(0, size - 65536)):
                stream.seek(position)
                digest.update(stream.read(65536))
    return digest.hexdigest()[:32]
