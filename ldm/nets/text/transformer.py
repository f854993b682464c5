"""Any text model that `transformers` loads, from a folder or the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from ldm.base.errors import InputError
from ldm.base.lazy import Tensor, torch
from ldm.nets.text.encoder import SUFFIXES, Count, Loaded, Text, Unavailable

HUB = r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}"
# their first position is that after the padding token's number
SHIFTED = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text", "ibert", "xmod"}


class Transformer(Text):
    kind: Literal["transformers"] = "transformers"
    model: str  # a folder, or ID@COMMIT on the hub

    def check(self, root: Path) -> None:
        if not re.fullmatch(HUB, self.model) and not (root / self.model).is_dir():
            hint = "ID@COMMIT on the hub, with the 40 hex digits of a commit: a branch moves, and the model would no longer load"
            raise ValueError(f"text.model: found {self.model!r}, neither a folder nor {hint}")

    def located(self, root: Path) -> Transformer:
        folder = root / self.model
        return self.model_copy(update={"model": str(folder)}) if folder.is_dir() else self

    def folder(self) -> Path | None:
        folder = Path(self.model)
        if folder.is_absolute() and not folder.is_dir():
            raise InputError(f"text.model: {folder} is gone; bring it back, or load the model from a folder that stays")
        return folder if folder.is_dir() else None

    def counter(self) -> tuple[Count, int | None]:
        tokenizer, positions = self._opened(self._files(weights=False))
        return lambda texts: [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]], positions

    def _files(self, weights: bool) -> Path:
        """The folder, or what the hub has under that name, fetched unless it is here."""
        if Path(self.model).is_dir():
            return Path(self.model)
        from huggingface_hub import snapshot_download

        repository, _, commit = self.model.partition("@")
        if not commit:  # without a commit, tomorrow's weights may be others
            raise InputError(f"text.model {self.model!r}: neither a folder here nor a hub id with a commit, ID@COMMIT")
        wanted = [f"*{end}" for end in SUFFIXES if weights or end != ".safetensors"]
        try:
            return Path(snapshot_download(repository, revision=commit, allow_patterns=wanted))
        except Exception as error:  # of many kinds, all of which mean that there is no such model
            reason = f"neither a folder here nor loadable from the hub ({str(error).splitlines()[0]})"
            raise Unavailable(f"text.model {self.model!r}: {reason}") from None

    def _opened(self, folder: Path) -> tuple[Any, int | None]:
        """Tokenizer in a folder, and positions of the encoder; `InputError` if these are fewer than `max_tokens`."""
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        except Exception as error:  # of many kinds, all of which mean that the folder holds no complete model
            raise InputError(f"text.model {self.model!r}: {folder} does not load as a transformers model: {error}") from error
        config = getattr(config, "text_config", None) or config  # CLIP and its like have an image tower beside it
        positions = getattr(config, "max_position_embeddings", None)  # T5 has no end
        if positions and config.model_type in SHIFTED:
            positions -= config.pad_token_id + 1
        if positions and positions < self.max_tokens:
            found = f"the encoder {self.model} has {positions} positions"
            raise InputError(f"text.max_tokens {self.max_tokens}: {found}; lower it to {positions}")
        return tokenizer, positions

    def load(self, device: torch.device) -> Loaded:
        folder = self._files(weights=True)
        tokenizer, _ = self._opened(folder)
        from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            encodes = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_TEXT_ENCODING_MAPPING  # T5: its encoder alone
            loader = AutoModelForTextEncoding if encodes else AutoModel
            model, report = loader.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        except Exception as error:  # of many kinds, all of which mean that the folder holds no complete model
            raise InputError(f"text.model {self.model!r}: {folder} does not load as a transformers model: {error}") from error
        if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):  # a pooler's output is not used
            raise InputError(f"text.model: {folder} lacks weights, the first {missing[0]}; fetch the whole model")
        model = getattr(model, "text_model", model)  # CLIP and its like have an image tower beside it
        model.eval().requires_grad_(False).to(device)

        def tokenize(texts: list[str]) -> list[list[int]]:
            ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
            return ids

        def embed(ids: Tensor, mask: Tensor) -> Tensor:
            hidden: Tensor = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            return hidden

        return Loaded(folder, tokenize, embed, int(model.config.hidden_size), pad=tokenizer.pad_token_id or 0)
