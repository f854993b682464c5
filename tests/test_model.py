"""The whole system as one object, tiny and untrained, by itself and through the command line."""

import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from scipy import stats
from tiny import refused
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from typer.testing import CliRunner

from ldm import LatentDiffusion
from ldm.base.errors import InputError
from ldm.base.options import kinds
from ldm.base.randomness import generator
from ldm.bayes.likelihoods import Bernoulli, DiscretizedGaussian, DiscretizedLogistic
from ldm.bayes.likelihoods.likelihood import Likelihood
from ldm.cli import app
from ldm.diffusion.options import Recipe
from ldm.diffusion.samplers.sampler import Sampler
from ldm.model import slerp
from ldm.nets.autoencoder import Autoencoder, AutoencoderKL, DiagonalGaussian, VQModel
from ldm.nets.text.transformer import Transformer
from ldm.nets.unet import UNet

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "handwritten", "seven", "nine", "the", "number", "eight", "of", "clubs"]
PROMPTS = ["a handwritten seven", "nine", "the number eight of clubs", "a nine", "seven"]
FEW = {"steps": 4, "sampler": {"kind": "heun"}}


def write_text_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=1.0,
    )
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    transformers.BertModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def loud(net: torch.nn.Module, gain: float) -> torch.nn.Module:
    """The last layer scaled, so that an untrained network's output shows in 8-bit pixels."""
    with torch.no_grad():
        net.conv_out.weight.mul_(gain)
    return net


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("text") / "encoder")


@pytest.fixture(scope="module")
def model(text_encoder) -> LatentDiffusion:
    torch.manual_seed(1)
    autoencoder = AutoencoderKL(1, 1, 2, [8, 16], norm_num_groups=4)
    loud(autoencoder.decoder, 3)
    unet = UNet(2, 2, [16, 16], 1, ["cross", "cross"], cross_attention_dim=8, num_heads=2, norm_num_groups=4)
    text = Transformer(model=str(text_encoder), max_tokens=12)
    recipe = Recipe(
        diffusion={"prediction": "v", "noise": {"kind": "cosine", "sigma_max": 80.0}},
        autoencoder="0" * 64,
        preprocessing={"image_size": 16, "channels": 1, "resize_filter": "lanczos"},
        latent_mean=[0.3, -0.2],
        latent_std=[1.5, 0.8],
        text={"options": text.model_dump(), "sha256": text.build().sha256},
        sampling={
            "sampler": {"kind": "dpmpp_2m"},
            "schedule": "karras",
            "steps": 5,
            "guidance": 3.0,
            "guidance_interval": None,
            "guidance_rescale": 0.0,
        },
    )
    return LatentDiffusion(autoencoder, DiscretizedLogistic(log_scale=-1.0).build(), loud(unet, 3), recipe)


def changed(model: LatentDiffusion, **recipe) -> LatentDiffusion:
    return LatentDiffusion(model.autoencoder, model.likelihood, model.unet, replace(model.recipe, **recipe))


def with_autoencoder(model: LatentDiffusion, autoencoder: Autoencoder, likelihood: Likelihood | None = None) -> LatentDiffusion:
    return LatentDiffusion(autoencoder, likelihood or model.likelihood, model.unet, model.recipe)


def vq_model(model: LatentDiffusion) -> LatentDiffusion:
    torch.manual_seed(2)
    autoencoder = VQModel(1, 1, 2, [8, 16], norm_num_groups=4, num_vq_embeddings=12)
    torch.nn.init.normal_(autoencoder.quantize.embedding.weight)
    return with_autoencoder(model, autoencoder)


@pytest.fixture
def decoded(model, monkeypatch) -> list[Tensor]:
    """Whatever latents an autoencoder decodes, once the memory of one has been measured."""
    seen: list[Tensor] = []
    model.decode(torch.zeros(2, *model.latent_shape()))
    for kind in (AutoencoderKL, VQModel):
        monkeypatch.setattr(kind, "decode", lambda self, z, decode=kind.decode: seen.append(z) or decode(self, z))
    return seen


def images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 1, 16, 16), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_images(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert (a.int() - b.int()).abs().max() <= 1


# Saving and loading


def test_saved_bytes_are_stable_and_samples_survive(model, tmp_path):
    model.save(tmp_path / "one")
    loaded = LatentDiffusion.load(tmp_path / "one")
    loaded.save(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert loaded.recipe == model.recipe
    assert_same_images(loaded.sample(PROMPTS, seed=3), model.sample(PROMPTS, seed=3))
    again = LatentDiffusion.load(tmp_path / "two")
    assert torch.equal(loaded.sample(PROMPTS, seed=3), again.sample(PROMPTS, seed=3))  # same folder, same bytes
    before, after = (m.bound(images(3), PROMPTS[:3], levels=4).nats for m in (model, loaded))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=0)
    assert loaded.likelihood.log_scale == model.likelihood.log_scale


def test_save_replaces_a_model_and_nothing_else(model, tmp_path):
    target = tmp_path / "models"
    model.save(target)
    changed(model, latent_mean=[0.0, 0.0]).save(target)
    assert LatentDiffusion.load(target).recipe.latent_mean == [0.0, 0.0]
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "empty")
    theses = tmp_path / "theses"
    theses.mkdir()
    (theses / "mine.txt").write_text("years of work")
    for place in (theses, theses / "mine.txt"):
        with pytest.raises(InputError, match="is not a saved model; name another folder"):
            model.save(place)
    assert files(theses) == {"mine.txt": b"years of work"}


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a file"])
def test_what_is_no_model_is_refused(what, tmp_path):
    place = tmp_path / "place"
    if what == "a file":
        place.write_text("hello")
    elif what == "an empty folder":
        place.mkdir()
    with pytest.raises(InputError, match=r"place: holds no model\.json; give a folder"):
        LatentDiffusion.load(place)


@pytest.mark.parametrize(
    "lost",
    [
        "autoencoder/config.json",
        "autoencoder/diffusion_pytorch_model.safetensors",
        "autoencoder/likelihood.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_lost_file_is_named(lost, model, tmp_path):
    model.save(tmp_path / "model")
    (tmp_path / "model" / lost).unlink()
    with pytest.raises(InputError, match=lost):
        LatentDiffusion.load(tmp_path / "model")


@pytest.mark.parametrize("section", ["diffusion", "sampling", "text"])
def test_a_recipe_with_a_choice_of_another_version_is_refused(section, model, tmp_path):
    model.save(tmp_path / "model")
    values = asdict(model.recipe)
    values[section] = {key: {"kind": "novelty"} if isinstance(value, dict) else value for key, value in values[section].items()}
    (tmp_path / "model/model.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="kind: found 'novelty'; known are"):
        LatentDiffusion.load(tmp_path / "model")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"kind": "v"}', '{"diffusion": {}}', None])
def test_a_damaged_or_foreign_recipe_is_refused(content, model, tmp_path):
    model.save(tmp_path / "model")
    text = json.dumps(asdict(model.recipe) | {"novelty": 1}) if content is None else content
    (tmp_path / "model/model.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.json: not a model of this version"):
        LatentDiffusion.load(tmp_path / "model")


def test_another_text_encoder_is_refused(model):
    other = changed(model, text=model.recipe.text | {"sha256": "f" * 64})
    with pytest.raises(InputError, match=f"the model was trained with {'f' * 64}"):
        other.sample(["nine"])


# Sampling


def test_samples_depend_on_seed_and_prompt(model):
    first, again, other = (model.sample(PROMPTS, seed=seed, **FEW) for seed in (0, 0, 1))
    assert first.dtype == torch.uint8
    assert first.shape == (5, 1, 16, 16)
    assert torch.equal(first, again)
    assert (first.int() - other.int()).abs().float().mean() > 5
    swapped = model.sample(PROMPTS[::-1], seed=0, **FEW)
    assert (first.int() - swapped.int()).abs().float().mean((1, 2, 3))[[0, 1, 3, 4]].min() > 1
    assert_same_images(first[2:3], swapped[2:3])


STOCHASTIC: dict[str, dict[str, float]] = {"ddpm": {}, "ddim": {"eta": 0.7}, "heun": {"churn": 3.0}, "langevin": {}}


@pytest.mark.parametrize("sampler", kinds(Sampler))
def test_an_image_of_64_is_the_same_alone(sampler, model, decoded):
    """By its number, to 1e-4 in the latents: noise that a sampler adds on its way comes from seed, number and step."""
    many = [PROMPTS[i % 5] for i in range(64)]
    options = {"seed": 7, "steps": 6, "sampler": {"kind": sampler, **STOCHASTIC.get(sampler, {})}}
    whole = model.sample(many, **options)
    for number in (0, 1, 37, 63):
        assert_same_images(model.sample(many[number : number + 1], first=number, **options), whole[number : number + 1])
    for number, alone in zip((0, 1, 37, 63), decoded[1:], strict=True):
        torch.testing.assert_close(alone[0], decoded[0][number], rtol=0, atol=1e-4)
    apart = (decoded[0][None] - decoded[0][:, None]).abs().amax((2, 3, 4))
    assert apart[~torch.eye(64, dtype=torch.bool)].min() > 1e-2  # no two of them alike


DRAW = """
import sys, torch
from ldm import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL

seen, decode = [], AutoencoderKL.decode
AutoencoderKL.decode = lambda self, z: seen.append(z) or decode(self, z)
folder, out, first, *prompts = sys.argv[1:]
LatentDiffusion.load(folder).sample(prompts, seed=7, steps=6, sampler="ddpm", first=int(first))
torch.save(torch.cat(seen)[-len(prompts):], out)  # one was measured before
"""


def test_two_processes_draw_what_one_does(model, tmp_path, decoded):
    model.save(tmp_path / "model")
    many = [PROMPTS[i % 5] for i in range(64)]
    model.sample(many, seed=7, steps=6, sampler="ddpm")
    halves = [
        subprocess.Popen([sys.executable, "-c", DRAW, tmp_path / "model", tmp_path / str(first), str(first), *many[first:][:32]])
        for first in (0, 32)
    ]
    assert [half.wait(timeout=120) for half in halves] == [0, 0]
    drawn = torch.cat([torch.load(tmp_path / name, weights_only=True) for name in ("0", "32")])
    torch.testing.assert_close(drawn, decoded[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_stochastic_samplers_add_noise_on_the_way(sampler, model):
    plain = {"ddpm": "euler", "ddim": "ddim", "heun": "heun", "langevin": "euler"}[sampler]
    options = {"kind": sampler, **STOCHASTIC[sampler]}, {"kind": plain}
    noisy, without = (model.sample(PROMPTS, steps=6, sampler=sampler) for sampler in options)
    assert (noisy.int() - without.int()).abs().float().mean() > 1


def test_an_image_does_not_depend_on_how_batches_are_split(model, monkeypatch):
    whole = model.sample(PROMPTS, seed=7, **FEW)
    monkeypatch.setenv("LDM_MEMORY_GB", "1e-9")
    alone = changed(model)  # has measured nothing yet
    assert_same_images(alone.sample(PROMPTS, seed=7, **FEW), whole)
    assert {alone.divided(what)._sizes.popitem()[1] for what in ("sample", "decode")} == {1}


@torch.inference_mode()
def test_sampling_is_guided_euler_written_out(model):
    """One image at a time in plain loops, from the draws that (seed, number) names; another kind of network too."""
    for prediction, guidance in (("v", 2.5), ("v", 1.0), ("flow", 2.5)):
        system = changed(model, diffusion=model.recipe.diffusion | {"prediction": prediction})
        text, mask = Transformer(**model.recipe.text["options"]).build()([*PROMPTS[:3], ""])
        high, low = (level ** (1 / 7) for level in (system.levels.sigma_max, system.levels.sigma_min))
        sigmas = [(high + i / 5 * (low - high)) ** 7 for i in range(6)] + [0.0]
        expected = []
        for i in range(3):
            x = math.sqrt(1 + sigmas[0] ** 2) * torch.randn(1, 2, 8, 8, generator=generator(11, "sample", i))
            for sigma, following in pairwise(sigmas):
                level = torch.tensor([sigma])
                wanted, empty = (system.denoiser(x, level, context=text[r, None], context_mask=mask[r, None]) for r in (i, 3))
                x0 = empty + guidance * (wanted - empty)
                x = x + (following - sigma) * (x - x0) / sigma
            shift, scale = (torch.tensor(v).view(1, 2, 1, 1) for v in (model.recipe.latent_mean, model.recipe.latent_std))
            pixels = model.autoencoder.decode(x * scale + shift)
            expected.append(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        found = system.sample(PROMPTS[:3], steps=6, guidance=guidance, sampler="euler", seed=11)
        assert_same_images(found, torch.cat(expected))


def test_the_models_own_defaults(model):
    assert torch.equal(model.sample(PROMPTS, seed=2), model.sample(PROMPTS, seed=2, steps=5, guidance=3.0, sampler="dpmpp_2m"))
    others = [{"steps": 6}, {"guidance": 1.0}, {"sampler": "euler"}, {"schedule": "exponential"}, {"schedule": "uniform"}]
    for other in [*others, {"guidance_interval": (0.1, 5.0)}, {"guidance_rescale": 0.9}, {"negative": "a nine"}, {"first": 1}]:
        assert not torch.equal(model.sample(PROMPTS, seed=2), model.sample(PROMPTS, seed=2, **other))


def test_a_samplers_options_do_not_pass_on_to_another(model):
    churned = changed(model, sampling=model.recipe.sampling | {"sampler": {"kind": "heun", "churn": 3.0}})
    assert torch.equal(churned.sample(PROMPTS, sampler="euler"), model.sample(PROMPTS, sampler="euler"))
    assert torch.equal(churned.sample(PROMPTS), churned.sample(PROMPTS, sampler="heun"))  # its own sampler, by its name alone
    assert not torch.equal(churned.sample(PROMPTS), churned.sample(PROMPTS, sampler={"kind": "heun", "churn": 0.0}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "plms"}, "sampler.kind: found 'plms'; known are 'ddim', 'ddpm', 'euler', 'dpmpp_2m', 'heun', '"),
        ({"schedule": "linear"}, "schedule: found 'linear'"),
        ({"steps": 0}, "steps: found 0"),
        ({"first": -1}, "first -1: images are numbered from 0"),
        ({"guidance": -1.0}, "guidance: found -1.0"),
        ({"stepz": 3}, "unknown key stepz: did you mean steps?"),
        ({"eta": 0.5}, "unknown key eta: known here: sampler, schedule, steps"),
        ({"sampler": {"kind": "dpmpp_2m", "eta": 0.5}}, "unknown key sampler.eta: known here: kind"),
        ({"sampler": {"kind": "euler", "churn": 1.0}}, "unknown key sampler.churn: known here: kind"),
        ({"sampler": {"kind": "ddim", "eta": 1.5}}, "sampler.eta: found 1.5"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance_interval is [2.0, 1.0]; give the lower noise level first"),
    ],
)
def test_sampling_that_cannot_be(options, message, model):
    with pytest.raises(InputError, match=re.escape(message)):
        model.sample(["nine"], **options)


def test_a_negative_prompt_takes_the_place_of_the_empty_caption(model):
    """And of nothing else: away from itself, a prompt is unguided."""
    unguided = model.sample(PROMPTS[1:2], guidance=1.0)
    assert_same_images(model.sample(PROMPTS[1:2], negative=PROMPTS[1], guidance=4.0), unguided)
    for options in ({"negative": "seven"}, {"guide": model}):
        with pytest.raises(InputError, match="guidance 1 leads nowhere"):
            model.sample(["nine"], guidance=1.0, **options)


def test_autoguidance_leads_away_from_the_weaker_model(model):
    """By itself a model is not led anywhere, from where it is led written out: euler's first step to 0."""
    assert_same_images(model.sample(PROMPTS, guide=model, guidance=4.0), model.sample(PROMPTS, guidance=1.0))
    torch.manual_seed(5)
    weak = LatentDiffusion(model.autoencoder, model.likelihood, loud(UNet(**model.unet.config), 3), model.recipe)
    found = model.sample(PROMPTS, guide=weak, guidance=2.0, sampler="euler", steps=1)
    sigma = torch.full((5,), model.levels.sigma_max)
    text, mask = model._embed(PROMPTS)
    noise = torch.stack([torch.randn(2, 8, 8, generator=generator(0, "sample", i)) for i in range(5)])
    x = math.sqrt(1 + model.levels.sigma_max**2) * noise
    good, bad = (m.denoiser(x, sigma, context=text, context_mask=mask) for m in (model, weak))
    shift, scale = (torch.tensor(v).view(1, 2, 1, 1) for v in (model.recipe.latent_mean, model.recipe.latent_std))
    assert_same_images(found, model.decode((2 * good - bad) * scale + shift))


def test_autoguidance_needs_the_same_latents(model):
    for other in (changed(model, autoencoder="1" * 64), changed(model, latent_mean=[0.0, 0.0])):
        with pytest.raises(InputError, match="trained on other latents"):
            model.sample(["nine"], guide=other)
    with pytest.raises(InputError, match="negative prompt or from a weaker model"):
        model.sample(["nine"], guide=model, negative="seven")


def with_flat_recipe(model: LatentDiffusion, folder: Path, sampling: dict[str, object], **fields: object) -> LatentDiffusion:
    """The model as loaded from a `model.json` of the first format: the options of all choices side by side."""
    model.save(folder)
    recipe = model.recipe
    flat = {
        "kind": "v",
        "noise": "cosine",
        "sigma_max": 80.0,
        "autoencoder": recipe.autoencoder,
        "preprocessing": recipe.preprocessing,
        "latent_mean": recipe.latent_mean,
        "latent_std": recipe.latent_std,
        "text": {"encoder": recipe.text["options"]["model"], "max_tokens": 12, "sha256": recipe.text["sha256"]},
        "sampling": sampling,
        **fields,
    }
    (folder / "model.json").write_text(json.dumps(flat))
    return LatentDiffusion.load(folder)


OLDEST = {"sampler": "dpmpp_2m", "steps": 5, "guidance": 3.0}
LATER = OLDEST | {"schedule": "karras", "eta": 0.0, "churn": 0.0, "guidance_interval": None, "guidance_rescale": 0.0}


@pytest.mark.parametrize(
    ("sampling", "fields", "today"),
    [
        (OLDEST, {}, {}),
        (LATER, {"shift": 1.0, "zero_terminal_snr": False}, {}),
        (OLDEST | {"sampler": "euler"}, {"shift": 2.0, "zero_terminal_snr": True}, {"sampler": {"kind": "euler"}}),
        (LATER, {"kind": "flow", "noise": "logitnormal", "shift": 2.0, "zero_terminal_snr": False}, {}),
        (LATER | {"sampler": "ddim", "eta": 0.5}, {}, {"sampler": {"kind": "ddim", "eta": 0.5}}),
        (LATER | {"sampler": "heun", "churn": 2.0}, {}, {"sampler": {"kind": "heun", "churn": 2.0}}),
        (
            LATER | {"schedule": "uniform", "guidance_interval": [0.5, 9.0], "guidance_rescale": 0.5},
            {},
            {"schedule": "uniform", "guidance_interval": [0.5, 9.0], "guidance_rescale": 0.5},
        ),
    ],
    ids=["oldest", "all fields", "noise levels", "flow", "ddim", "heun", "guidance"],
)
def test_a_model_of_the_first_format_draws_the_same_images(sampling, fields, today, model, tmp_path):
    """Its `model.json` may lack the fields that were added later: then their defaults hold."""
    loaded = with_flat_recipe(model, tmp_path / "model", sampling, **fields)
    flat = {"kind": "v", "noise": "cosine"} | fields
    levels = {name: flat[name] for name in ("shift", "zero_terminal_snr") if flat.get(name)}
    diffusion = {"prediction": flat["kind"], "noise": {"kind": flat["noise"], "sigma_max": 80.0, **levels}}
    same = changed(model, diffusion=diffusion, sampling=model.recipe.sampling | today)
    assert loaded.recipe.sampling == same.recipe.sampling
    assert torch.equal(loaded.levels.table, same.levels.table)
    assert_same_images(loaded.sample(PROMPTS), same.sample(PROMPTS))
    assert_same_images(loaded.sample(PROMPTS, steps=3), same.sample(PROMPTS, steps=3))
    loaded.save(tmp_path / "again")  # in today's format
    assert_same_images(LatentDiffusion.load(tmp_path / "again").sample(PROMPTS), same.sample(PROMPTS))


def test_a_model_of_the_first_format_may_use_minilm():
    flat = {"kind": "v", "noise": "linear", "sigma_max": 80.0, "autoencoder": "0", "preprocessing": {}, "latent_mean": []}
    text = {"encoder": "minilm", "max_tokens": 16, "sha256": "1"}
    recipe = Recipe.read({**flat, "latent_std": [], "text": text, "sampling": OLDEST})
    assert recipe.text == {"options": {"kind": "minilm", "max_tokens": 16}, "sha256": "1"}


# Encoding, decoding, interpolation


def test_decode_of_encode(model):
    pixels = images(3)
    posterior = model.encode(pixels)
    assert posterior.mean.shape == (3, *model.latent_shape())
    with torch.no_grad():
        expected = model.autoencoder.decode(model.autoencoder.encode(pixels.float() / 127.5 - 1).mean)
    assert_same_images(model.decode(posterior.mean), ((expected + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


@torch.inference_mode()
def test_decode_gives_the_mean_of_the_likelihood(model):
    z = model.encode(images(3)).mean
    output = model.autoencoder.decode(z).double().numpy()
    grey = np.round((np.tanh(output / 2) + 1) * 127.5)
    assert_same_images(with_autoencoder(model, model.autoencoder, Bernoulli().build()).decode(z), torch.tensor(grey))
    torch.manual_seed(0)
    twice = AutoencoderKL(1, 2, 2, [8, 16], norm_num_groups=4)  # means, and log-scales that do not show
    means = twice.decode(z)[:, :1].double().numpy()
    expected = np.clip(np.round((means + 1) * 127.5), 0, 255)
    assert_same_images(
        with_autoencoder(model, twice, DiscretizedGaussian(log_scale=-1.0, scale="per_pixel").build()).decode(z),
        torch.tensor(expected),
    )


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(8), dtype=torch.uint8)


@pytest.mark.parametrize(("tile", "size"), [(32, (32, 32)), (48, (20, 38)), (16, (16, 10))])
def test_an_image_within_a_tile_is_worked_on_as_without(tile, size, model):
    pixels = noise(2, 1, *size)
    tiled, whole = model.encode(pixels, tile), model.encode(pixels)
    torch.testing.assert_close((tiled.mean, tiled.logvar), (whole.mean, whole.logvar), rtol=1e-4, atol=1e-4)
    assert_same_images(model.decode(whole.mean, tile), model.decode(whole.mean))


def test_a_large_image_is_worked_on_by_tiles(model, monkeypatch):
    """Of functions of single latents, nothing is seen of the tiles; what they are of networks, `test_tiling` says."""
    autoencoder, seen = AutoencoderKL(1, 1, 1, [4, 4], norm_num_groups=4), []

    def encode(x: Tensor) -> DiagonalGaussian:
        seen.append(x.shape[2:])
        mean = torch.nn.functional.avg_pool2d(x, 2)
        return DiagonalGaussian(mean, mean - 3)

    def decode(z: Tensor) -> Tensor:
        seen.append(z.shape[2:])
        return torch.nn.functional.interpolate(2 * z, scale_factor=2)

    monkeypatch.setattr(autoencoder, "encode", encode)
    monkeypatch.setattr(autoencoder, "decode", decode)
    system, pixels = with_autoencoder(model, autoencoder, Bernoulli().build()), noise(1, 1, 90, 130)
    tiled, whole = system.encode(pixels, 32), system.encode(pixels)
    torch.testing.assert_close((tiled.mean, tiled.logvar), (whole.mean, whole.logvar))
    assert_same_images(system.decode(whole.mean, 32), system.decode(whole.mean))
    tiles, latents = seen[:24], seen[25:49]  # 4 by 6 of 32 pixels that share 8 or more
    assert set(tiles) == {(32, 32)} and set(latents) == {(16, 16)}
    assert seen[24] == (90, 130) and seen[49:] == [(45, 65)]


def test_tiles_hold_whole_latents(model):
    with pytest.raises(InputError, match="tile 15: use a multiple of 2 pixels, 16 or more"):
        model.encode(noise(1, 1, 32, 32), tile=15)


# The autoencoder alone: ancestral samples and traversals


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_an_ancestral_sample_is_its_seeds_and_numbers(kind, model):
    system = model if kind == "kl" else vq_model(model)
    five, two, other = system.sample_prior(5, seed=3), system.sample_prior(2, seed=3), system.sample_prior(5, seed=4)
    assert five.shape == (5, 1, 16, 16) and five.dtype == torch.uint8
    assert torch.equal(five[:2], two)
    assert len({image.numpy().tobytes() for image in (*five, *other)}) == 10


def test_ancestral_samples_have_the_spread_of_prior_and_likelihood(model, monkeypatch):
    """Of x = z/4 + noise: z is the standard normal that (seed, number) names, the noise that of the likelihood."""
    autoencoder = AutoencoderKL(1, 1, 1, [4], norm_num_groups=4)
    monkeypatch.setattr(autoencoder, "decode", lambda z: z / 4)
    scale = math.exp(-3.5)
    system = with_autoencoder(model, autoencoder, DiscretizedLogistic(log_scale=-3.5).build())
    x = system.sample_prior(64, seed=5).double() / 127.5 - 1
    z = torch.stack([torch.randn(1, 16, 16, generator=generator(5, "prior", i)) for i in range(64)]).double()
    rest = (x - z / 4)[z.abs() < 3]  # beyond, 8-bit values end
    assert abs(rest.mean()) < 4 * rest.std() / math.sqrt(len(rest))
    assert float(rest.var()) == pytest.approx(math.pi**2 / 3 * scale**2 + (2 / 255) ** 2 / 12, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([rest, z[z.abs() < 3]]))[0, 1]) < 4 / math.sqrt(len(rest))
    assert float(z.var()) == pytest.approx(1, rel=0.05)
    # a quarter of a logistic's draws lies beyond 1.0986 scales to either side, and 1.8 % beyond 4
    for threshold, share in ((math.log(3), 0.5), (4.0, 2 / (1 + math.exp(4)))):
        beyond = (rest.abs() > threshold * scale).double().mean()
        assert float(beyond) == pytest.approx(share, abs=0.025)


def test_a_vq_models_prior_is_uniform_over_its_codes(model, decoded):
    system = vq_model(model)
    system.sample_prior(40, seed=1)
    z = torch.cat(decoded).movedim(1, -1).flatten(0, -2)  # (40 · 8 · 8, 2)
    codes = system.autoencoder.quantize.embedding.weight
    matches = (z[:, None] == codes).all(-1)
    assert len(z) == 40 * 64 and matches.sum(1).eq(1).all()
    assert stats.chisquare(matches.sum(0).numpy()).pvalue > 0.001


def test_a_traversal_shifts_one_channel_after_the_other(model, decoded):
    image = images(1)[0]
    walked = model.traverse(image, 5, reach=2)
    mean = model.encode(image[None]).mean
    shifts = torch.cat(decoded) - mean
    expected = torch.zeros(10, 2, 8, 8)
    for channel, std in enumerate(model.recipe.latent_std):
        for i, steps in enumerate((-2, -1, 0, 1, 2)):
            expected[5 * channel + i, channel] = steps * std
    torch.testing.assert_close(shifts, expected, rtol=0, atol=1e-5)
    assert walked.shape == (10, 1, 16, 16)
    for middle in (2, 7):
        assert_same_images(walked[middle : middle + 1], model.decode(mean))
    assert not torch.equal(walked[0], walked[2]) and not torch.equal(walked[0], walked[5])
    still = model.traverse(image, 2, reach=0)
    assert_same_images(still, model.decode(mean).expand(4, -1, -1, -1))


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_linear_walk_between_images_is_a_line_between_their_latents(kind, model, decoded):
    system = model if kind == "kl" else vq_model(model)
    a, b = images(2)
    walk = system.interpolate(a, b, 5, linear=True)
    ends = system.encode(images(2)).mean
    expected = torch.stack([torch.lerp(ends[0], ends[1], weight) for weight in (0.0, 0.25, 0.5, 0.75, 1.0)])
    torch.testing.assert_close(torch.cat(decoded)[-len(expected) :], expected, rtol=1e-4, atol=1e-5)  # one was measured
    assert walk.shape == (5, 1, 16, 16)
    assert not torch.equal(walk[2], system.interpolate(a, b, 5)[2]) or kind == "vq"


@pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 2), (2, 0)])  # prompts of unequal lengths
def test_a_walk_between_prompts_starts_and_ends_at_their_samples(a, b, model):
    walk = model.interpolate(PROMPTS[a], PROMPTS[b], 5, seed=6, **FEW)
    assert walk.shape == (5, 1, 16, 16)
    ends = torch.cat([model.sample([PROMPTS[i]], seed=6, **FEW) for i in (a, b)])
    assert_same_images(walk[[0, -1]], ends)
    assert (ends[0].int() - ends[1].int()).abs().float().mean() > 1
    assert all(not torch.equal(x, y) for x, y in pairwise(walk))


def test_a_walk_between_images_starts_and_ends_at_their_reconstructions(model):
    a, b = images(2)
    walk = model.interpolate(a, b, 6)
    assert walk.shape == (6, 1, 16, 16)
    assert_same_images(walk[[0, -1]], model.decode(model.encode(images(2)).mean))


def test_a_walk_needs_two_of_a_kind(model):
    with pytest.raises(InputError, match="two prompts or two images"):
        model.interpolate("nine", images(1)[0], 3)


def test_slerp_is_a_great_circle():
    a, b = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = 2 * a / a.norm(), 2 * b / b.norm()
    path = slerp(a, b, torch.linspace(0, 1, 9, dtype=torch.float64))
    torch.testing.assert_close(path.flatten(1).norm(dim=1), torch.full((9,), 2.0, dtype=torch.float64))
    steps = torch.cosine_similarity(path[:-1].flatten(1), path[1:].flatten(1))
    torch.testing.assert_close(steps, steps[:1].expand(8))
    torch.testing.assert_close(path[[0, -1]], torch.cat([a, b]))


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, -0.5, 0.0])
def test_slerp_of_parallel_latents_stays_between_them(factor):
    a = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    path = slerp(a, factor * a, torch.linspace(0, 1, 5))
    assert path.isfinite().all()
    assert path.abs().max() <= a.abs().max() * max(1, abs(factor)) * 1.001
    torch.testing.assert_close(path[[0, -1]], torch.cat([a, factor * a]))


# The text encoder's files, and prompts that it does not read to their end


def test_a_saved_model_takes_its_encoders_folder_with_it(model, text_encoder, tmp_path, monkeypatch):
    """Named as in a project, relative to that, wherever the caller is; then the project is gone."""
    root, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    shutil.copytree(text_encoder, root / "encoders/mine")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = replace(
        model.recipe, text={**model.recipe.text, "options": {**model.recipe.text["options"], "model": "encoders/mine"}}
    )
    LatentDiffusion(model.autoencoder, model.likelihood, model.unet, recipe, root).save(root / "models/ldm")
    expected = model.sample(PROMPTS[:2], seed=1, **FEW)
    shutil.move(root / "models/ldm", tmp_path / "moved")
    shutil.rmtree(root)
    moved = LatentDiffusion.load(tmp_path / "moved")
    assert moved.recipe.text["options"]["model"] == "encoders/mine"  # where it came from
    assert torch.equal(moved.sample(PROMPTS[:2], seed=1, **FEW), expected)
    moved.save(tmp_path / "again")
    names = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / "moved" / name).read_bytes() for name in names)
    loaded = LatentDiffusion.load(tmp_path / "again")
    shutil.rmtree(tmp_path / "again")  # as a download, which is temporary
    assert torch.equal(loaded.sample(PROMPTS[:2], seed=1, **FEW), expected)
    with pytest.raises(InputError, match=r"text\.model: .*again/text_encoder is gone; bring it back"):
        loaded.save(tmp_path / "a third")
    weights = next((tmp_path / "moved/text_encoder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"text encoder in .*/moved/text_encoder: found sha256"):
        LatentDiffusion.load(tmp_path / "moved")


def test_a_model_saved_without_its_encoder_still_loads(model, tmp_path):
    model.save(tmp_path / "model")
    shutil.rmtree(tmp_path / "model/text_encoder")
    loaded = LatentDiffusion.load(tmp_path / "model")
    assert_same_images(loaded.sample(PROMPTS[:1], **FEW), model.sample(PROMPTS[:1], **FEW))


CUT = "seven of nine of " * 4 + "clubs"  # 17 words, of which 10 fit


def test_a_prompt_that_is_cut_gives_a_warning(model):
    with pytest.warns(
        UserWarning, match=r"a prompt is cut at 12 tokens: 'seven of nine of .*…' has 19; the rest changes nothing"
    ):
        model.sample([CUT, "nine"], **FEW)
    with pytest.warns(UserWarning, match="2 of 2 prompts are cut at 12 tokens"):
        model.interpolate(CUT, f"{CUT} eight", 2, **FEW)
    with pytest.warns(UserWarning, match="a prompt is cut"):
        model.sample(["nine"], negative=CUT, guidance=2.0, **FEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(["a " * 10], **FEW)  # as many as fit
        model.bound(images(1), [CUT], levels=1)  # of captions the stages have said it


@pytest.mark.parametrize("command", [("sample", "--prompt", CUT), ("interpolate", CUT, "nine")], ids=lambda command: command[0])
def test_the_command_line_says_that_a_prompt_is_cut_in_one_line(command, saved, tmp_path):
    arguments = [*command, "--set", "steps=1", "--model", str(saved / "model"), "--out", str(tmp_path / "x.png")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    lines = [line for line in result.stderr.splitlines() if "cut at" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: a prompt is cut at 12 tokens: 'seven of nine")
    assert "UserWarning" not in result.stderr and ".py" not in result.stderr


def test_pictures_are_named_by_their_numbers(saved, tmp_path):
    call(saved, tmp_path / "a", "sample", "--prompt", "nine", "--prompt", "seven", "-n", "2", "--first", "16", "--set", "steps=1")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"{number:04d}.png" for number in range(16, 20)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--prompt", "x", "--set", "steps=0"], "steps: found 0"),
        (["sample", "--prompt", "x", "--set", "stepz=3"], "did you mean steps?"),
        (["sample", "--prompt", "x", "--set", "guidance=.nan"], "guidance: found nan"),
        (["sample", "--prompt", "x", "--set", "guidance=1", "--negative", "y"], "guidance 1 leads nowhere"),
        (["sample", "--prompt", "x", "--negative", "y", "--guide", "model"], "give one of the two"),
        (["interpolate", "x", "y", "--set", "sampler.kind=plms"], "sampler.kind: found 'plms'"),
        (["interpolate", "text.png", "a.png"], "text.png: not a readable image"),
        (["autoencoder", "reconstruct", "text.png"], "text.png: not a readable image"),
    ],
)
def test_what_the_recipe_rules_out_is_said_before_torch_is_imported(arguments, message, saved):
    arguments = [*arguments, "--model", "model", "--out", "new.png"]
    done = refused(arguments, saved)
    assert message in done.stdout and done.stdout.endswith("False\n"), done.stdout


# The bound


def test_a_vq_model_has_no_bound_and_samples_all_the_same(model):
    system = vq_model(model)
    with pytest.raises(InputError, match="undefined for a VQ autoencoder"):
        system.bound(images(1), PROMPTS[:1], levels=2)
    assert system.sample(PROMPTS[:2], **FEW).shape == (2, 1, 16, 16)


def test_bound_is_per_key_and_independent_of_the_batch(model):
    pixels, keys = images(5), list("abcde")
    whole = model.bound(pixels, PROMPTS, levels=6, seed=1, keys=keys)
    assert whole.dims == 256
    order = [3, 0, 4, 2, 1]
    parts = [[3, 0], [4], [2, 1]]
    for term in ("reconstruction", "entropy", "prior", "nats"):
        found = torch.cat(
            [
                getattr(
                    model.bound(pixels[part], [PROMPTS[i] for i in part], levels=6, seed=1, keys=[keys[i] for i in part]), term
                )
                for part in parts
            ]
        )
        torch.testing.assert_close(found, getattr(whole, term)[order], rtol=1e-4, atol=1e-3)


def test_bound_repeats_and_other_keys_or_seeds_draw_otherwise(model):
    pixels = images(2)

    def nats(seed: int, keys: list[str] | None) -> Tensor:
        return model.bound(pixels, PROMPTS[:2], levels=3, seed=seed, keys=keys).nats

    first = nats(0, ["a", "b"])
    assert torch.equal(first, nats(0, ["a", "b"]))
    assert (first != nats(1, ["a", "b"])).all()
    assert (first != nats(0, ["c", "d"])).all()
    assert torch.equal(nats(0, None), nats(0, ["0", "1"]))


def test_bound_takes_no_guidance_but_the_prompt(model):
    pixels = images(2)
    first = model.bound(pixels, PROMPTS[:2], levels=3)
    other = changed(model, sampling=model.recipe.sampling | {"sampler": {"kind": "euler"}, "steps": 1, "guidance": 9.0})
    assert torch.equal(first.nats, other.bound(pixels, PROMPTS[:2], levels=3).nats)
    prompted = model.bound(pixels, PROMPTS[2:4], levels=3)
    assert torch.equal(first.reconstruction, prompted.reconstruction)
    assert (first.prior != prompted.prior).all()


@torch.inference_mode()
def test_bound_written_out(model):
    """One image, one level, in plain float64 arithmetic from the same draws."""
    pixels, key = images(1), "some key"
    random = generator(5, "bound", key)
    z_noise, noise = torch.randn(1, 2, 8, 8, generator=random), torch.randn(1, 2, 8, 8, generator=random)
    position = float(torch.rand(1, generator=random))
    low, high = float(model.levels.table[0]), float(model.levels.table[-1])
    sigma = low * (high / low) ** position

    posterior = model.encode(pixels)
    z = posterior.mean + (posterior.logvar / 2).exp() * z_noise
    shift, scale = (torch.tensor(v).view(1, 2, 1, 1) for v in (model.recipe.latent_mean, model.recipe.latent_std))
    standard = (z - shift) / scale
    text, mask = Transformer(**model.recipe.text["options"]).build()([PROMPTS[0]])
    denoised = model.denoiser(standard + sigma * noise, torch.tensor([sigma]), context=text, context_mask=mask)
    error = float((standard - denoised).double().square().sum())
    end = torch.distributions.kl_divergence(
        torch.distributions.Normal(standard.double(), high), torch.distributions.Normal(0.0, math.sqrt(high**2 + 1))
    )
    prior = -float(end.sum()) - math.log(high / low) * error / sigma**2 - 64 * (1 + math.log(2 * math.pi * low**2))
    entropy = float(torch.distributions.Normal(posterior.mean, posterior.std).entropy().sum()) - 64 * math.log(1.5 * 0.8)
    reconstruction = float(model.likelihood.log_prob(pixels / 127.5 - 1, model.autoencoder.decode(z)).sum())

    found = model.bound(pixels, PROMPTS[:1], levels=1, seed=5, keys=[key])
    assert float(found.prior) == pytest.approx(prior, rel=1e-4)
    assert float(found.entropy) == pytest.approx(entropy, rel=1e-4)
    assert float(found.reconstruction) == pytest.approx(reconstruction, rel=1e-4)
    assert float(found.bits_per_dim) == pytest.approx(-(prior + entropy + reconstruction) / 256 / math.log(2), rel=1e-4)


@pytest.mark.parametrize(
    ("prediction", "noise"),
    [("eps", "linear"), ("x0", "scaled_linear"), ("v", "cosine"), ("edm", "lognormal"), ("flow", "uniform")],
)
def test_every_prediction_is_finite_over_its_whole_range(prediction, noise, model):
    system = changed(model, diffusion={"prediction": prediction, "noise": {"kind": noise, "sigma_max": 80.0}})
    assert system.bound(images(3), PROMPTS[:3], levels=16).nats.isfinite().all()
    once, again = system.sample(PROMPTS, **FEW), system.sample(PROMPTS[:1], **FEW)
    assert_same_images(once[:1], again)
    assert once.float().std() > 1


def test_more_levels_mean_the_same_bound_with_less_spread(model):
    """The draws of one key spread over ln sigma without favouring any."""
    pixels = images(1).expand(64, -1, -1, -1)

    def prior(levels: int) -> Tensor:
        return model.bound(pixels, ["nine"] * 64, levels=levels, keys=[str(i) for i in range(64)]).prior

    few, many = prior(2), prior(32)
    assert abs(few.mean() - many.mean()) < 4 * few.std() / 8
    assert many.std() < few.std() / 2


# The command line


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """A folder of the model and of images larger than it works on."""
    folder = tmp_path_factory.mktemp("command line")
    model.save(folder / "model")
    for name, (height, width) in {"a": (20, 30), "b": (41, 22), "c": (16, 16)}.items():
        Image.fromarray(noise(height, width).numpy()).save(folder / f"{name}.png")
    (folder / "text.png").write_text("no image")
    return folder


def call(saved: Path, out: Path, *arguments: str) -> str:
    """The command's line on stdout; names of files are those in `saved`."""
    given = [str(saved / argument) if argument.endswith(".png") else argument for argument in arguments]
    result = CliRunner().invoke(app, [*given, "--model", str(saved / "model"), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_prior_samples_are_written_as_a_sheet_a_file_or_a_folder(saved, model, tmp_path):
    command = ("autoencoder", "sample", "--seed", "4")
    assert call(saved, tmp_path / "many", *command, "-n", "3") == f"3 images written to {tmp_path / 'many'}\n"
    drawn = np.stack([read(path) for path in sorted((tmp_path / "many").iterdir())])
    assert_same_images(torch.tensor(drawn)[:, None], model.sample_prior(3, seed=4))
    assert "1 image written" in call(saved, tmp_path / "one.png", *command, "-n", "1")
    assert np.array_equal(read(tmp_path / "one.png"), drawn[0])
    call(saved, tmp_path / "sheet.png", *command)
    assert read(tmp_path / "sheet.png").shape == (166, 586, 3)  # two rows of eight


def test_every_option_of_sampling_reaches_the_sampler(saved, model, tmp_path):
    chosen = {"schedule": "uniform", "steps": 5, "guidance": 4.0, "guidance_rescale": 0.5, "guidance_interval": [0.5, 9.0]}
    assignments = ["sampler.kind=heun", "sampler.churn=2.0", *(f"{name}={value}" for name, value in chosen.items())]
    command = ("sample", "--prompt", "nine", "-n", "2", "--seed", "3", "--first", "5", "--negative", "seven")
    call(saved, tmp_path / "a", *command, *(text for assignment in assignments for text in ("--set", assignment)))
    heun = {"kind": "heun", "churn": 2.0}
    expected = model.sample(["nine"] * 2, seed=3, first=5, negative="seven", sampler=heun, **chosen)
    assert_same_images(torch.tensor(np.stack([read(tmp_path / f"a/{i:04d}.png") for i in (5, 6)]))[:, None], expected)
    guided = ("sample", "--prompt", "nine", "--guide", str(saved / "model"))
    call(saved, tmp_path / "b", *guided, "--set", "sampler.eta=0.5", "--set", "sampler.kind=ddim")  # in any order
    expected = model.sample(["nine"], guide=model, sampler={"kind": "ddim", "eta": 0.5})
    assert_same_images(torch.tensor(read(tmp_path / "b/0000.png"))[None, None], expected)


def test_reconstructions_stand_beside_their_originals(saved, model, tmp_path):
    call(saved, tmp_path / "back", "autoencoder", "reconstruct", "a.png", "c.png")
    back = [read(path) for path in sorted((tmp_path / "back").iterdir())]
    square = torch.tensor(read(saved / "c.png"))[None, None]  # as large as the model's images, so as it is
    assert_same_images(torch.tensor(back[1])[None, None], model.decode(model.encode(square).mean))
    call(saved, tmp_path / "sheet.png", "autoencoder", "reconstruct", "a.png", "c.png")
    sheet = read(tmp_path / "sheet.png")[..., 0]
    shown = np.kron(square[0, 0].numpy(), np.ones((4, 4), np.uint8))  # enlarged four times
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (2, 64))
    top, left = np.argwhere((windows == shown[:2]).all((2, 3)))[0]  # where it is drawn, among labels and frames
    assert np.array_equal(sheet[top : top + 64, left : left + 64], shown)
    right = sheet[top : top + 64, left + 64 :]
    again = np.kron(back[1], np.ones((4, 4), np.uint8))
    assert any(np.array_equal(right[:, x : x + 64], again) for x in range(right.shape[1] - 63))


def test_tiles_keep_the_size_of_an_image(saved, model, tmp_path):
    call(saved, tmp_path / "back", "autoencoder", "reconstruct", "a.png", "b.png", "--tile", "16")
    shapes = [read(path).shape for path in sorted((tmp_path / "back").iterdir())]
    assert shapes == [(20, 30), (40, 22)]  # down to the autoencoder's factor
    whole = torch.tensor(read(saved / "a.png"))[None, None]
    expected = model.decode(model.encode(whole, 16).mean, 16)
    assert_same_images(torch.tensor(read(tmp_path / "back/0000.png"))[None, None], expected)
    call(saved, tmp_path / "one.png", "autoencoder", "reconstruct", "b.png", "--tile", "64")
    assert read(tmp_path / "one.png").shape == (40, 22)


def test_traversals_have_a_row_for_each_channel(saved, model, tmp_path):
    call(saved, tmp_path / "walk", "autoencoder", "traverse", "c.png", "-n", "5", "--reach", "1")
    walked = np.stack([read(path) for path in sorted((tmp_path / "walk").iterdir())])
    expected = model.traverse(torch.tensor(read(saved / "c.png"))[None], 5, reach=1)
    assert_same_images(torch.tensor(walked)[:, None], expected)
    call(saved, tmp_path / "sheet.png", "autoencoder", "traverse", "c.png")
    height, width, _ = read(tmp_path / "sheet.png").shape
    assert 2 * 70 < height < 3 * 70 and 7 * 70 < width < 9 * 70  # two channels, seven steps, labels


def test_a_linear_walk_differs_from_a_great_circle_between_its_ends(saved, model, tmp_path):
    for name, more in (("circle", ()), ("line", ("--linear",))):
        call(saved, tmp_path / name, "interpolate", "a.png", "c.png", "-n", "3", *more)
    circle, line = ([read(path) for path in sorted((tmp_path / name).iterdir())] for name in ("circle", "line"))
    assert_same_images(*(torch.tensor(np.stack([walk[0], walk[2]])) for walk in (circle, line)))
    assert not np.array_equal(circle[1], line[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("autoencoder", "sample", "--out", "no/such/x.png"), "--out no/such/x.png: the folder no/such does not exist"),
        (("autoencoder", "sample", "--out", "x.jpg"), "--out x.jpg: write a .png, or a folder"),
        (("autoencoder", "reconstruct", "gone.png", "--out", "x.png"), "gone.png: no such file"),
        (("autoencoder", "reconstruct", "text.png", "--out", "x.png"), "text.png: not a readable image"),
        (("autoencoder", "reconstruct", "a.png", "b.png", "--tile", "16", "--out", "x.png"), "different sizes make no sheet"),
        (("autoencoder", "reconstruct", "a.png", "--tile", "15", "--out", "x.png"), "tile 15: use a multiple of 2"),
        (("autoencoder", "reconstruct", "a.png", "--tile", "1", "--out", "x.png"), "tile 1: use a multiple of 2"),
        (("autoencoder", "traverse", "gone.png", "--out", "x.png"), "gone.png: no such file"),
        (("sample", "--prompt", "nine", "--set", "sampler.eta=0.5", "--out", "x.png"), "unknown key sampler.eta"),
        (("sample", "--prompt", "nine", "--set", "schedule=log", "--out", "x.png"), "schedule: found 'log'"),
        (("sample", "--prompt", "nine", "--set", "steps", "--out", "x.png"), "--set 'steps': write KEY=VALUE"),
        (("sample", "--prompt", "nine", "--set", "step=3", "--out", "x.png"), "did you mean steps?"),
        (("interpolate", "nine", "seven", "--set", "sampler.kind=plms", "--out", "x.png"), "sampler.kind: found 'plms'"),
        (("sample", "--prompt", "nine", "--guide", "no/model", "--out", "x.png"), "no/model: holds no model.json"),
        (("interpolate", "nine", "seven", "--linear", "--out", "x.png"), "--linear joins two images"),
        (("interpolate", "a.png", "a.png", "--set", "stepz=3", "--out", "x.png"), "unknown key stepz"),
        (("sample", "--prompt", "nine", "--set", "seed=3", "--out", "x.png"), "unknown key seed: known here: sampler, schedule"),
        (("sample", "--prompt", "nine", "--set", "steps=null", "--out", "x.png"), "steps: found None"),
        (("interpolate", "a.png", "nine", "--linear", "--out", "x.png"), "give two images or two prompts"),
    ],
)  # fmt: skip
def test_what_the_commands_cannot_do_is_said_in_one_line(arguments, message, saved, monkeypatch):
    monkeypatch.chdir(saved)
    before = sorted(path.name for path in saved.iterdir())
    result = CliRunner().invoke(app, [*arguments, "--model", "model"])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert sorted(path.name for path in saved.iterdir()) == before
