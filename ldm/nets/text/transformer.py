"""Any text model that `transformers` loads, from a folder or the hub."""

import re
from pathlib import Path
from typing import Literal

from ldm.base.errors import InputError
from ldm.base.lazy import Tensor, torch
from ldm.nets.text.encoder import SUFFIXES, Embed, Text

HUB = r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}"


class Transformer(Text):
    kind: Literal["transformers"] = "transformers"
    model: str  # a folder, or ID@COMMIT on the hub

    def check(self, root: Path) -> None:
        if not re.fullmatch(HUB, self.model) and not (root / self.model).is_dir():
            hint = "ID@COMMIT on the hub, with the 40 hex digits of a commit: a branch moves, and the model would no longer load"
            raise ValueError(f"text.model: found {self.model!r}, neither a folder nor {hint}")

    def load(self) -> tuple[Path, Embed, int]:
        folder = Path(self.model)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            repository, _, commit = self.model.partition("@")
            if not commit:  # without a commit, tomorrow's weights may be others
                raise InputError(f"text.model {self.model!r}: neither a folder here nor a hub id with a commit, ID@COMMIT")
            try:
                folder = Path(snapshot_download(repository, revision=commit, allow_patterns=[f"*{end}" for end in SUFFIXES]))
            except Exception as error:  # of many kinds, all of which mean that there is no such model
                reason = f"neither a folder here nor loadable from the hub ({str(error).splitlines()[0]})"
                raise InputError(f"text.model {self.model!r}: {reason}") from None
        from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
            encodes = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_TEXT_ENCODING_MAPPING  # T5: its encoder alone
            loader = AutoModelForTextEncoding if encodes else AutoModel
            model, report = loader.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        except Exception as error:  # of many kinds, all of which mean that the folder holds no complete model
            raise InputError(f"text.model {self.model!r}: {folder} does not load as a transformers model: {error}") from error
        if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):  # a pooler's output is not used
            raise InputError(f"text.model: {folder} lacks weights, the first {missing[0]}; fetch the whole model")
        model = getattr(model, "text_model", model)  # CLIP and its like have an image tower beside it
        model.eval().requires_grad_(False)

        def embed(texts: list[str]) -> tuple[Tensor, Tensor]:
            tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt")
            return model(**tokens).last_hidden_state, tokens["attention_mask"].bool()

        return folder, embed, int(model.config.hidden_size)
