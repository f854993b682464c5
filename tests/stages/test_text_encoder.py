"""A text encoder of one's own, in a folder of the project, through the stages to a model that needs the project no more."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from blobs import make_project, run_stages
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ldm import LatentDiffusion

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "blob"]


def write_encoder(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    transformers.BertModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def test_a_relative_folder_is_the_projects_and_the_model_takes_it_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_encoder(tmp_path / "project/encoders/mine")
    text = {"kind": "transformers", "model": "encoders/mine", "max_tokens": 8}
    few = {"images": 64, "batch_size": 32, "warmup_images": 0, "checkpoint_images": 64}
    root = make_project(tmp_path / "project", {"text": text, "train_vae": few})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_stages(root, "train_vae", "cache_latents", "train_unet", "evaluate")
    manifest = json.loads((root / "data/latents/manifest.json").read_text())
    assert manifest["text"] == text  # the same in every clone
    expected = LatentDiffusion.load(root / "models/ldm").sample(["a blob"], seed=1)
    shutil.copytree(root / "models/ldm", tmp_path / "elsewhere/model")
    shutil.rmtree(root)
    assert torch.equal(LatentDiffusion.load("model").sample(["a blob"], seed=1), expected)
