"""Sampling with guidance against diffusers' `StableDiffusionPipeline`: the same weights, text embeddings and evaluations.

Figures are ratios, above 1 where ours is faster. `make bench` prints them, with what share of each side the networks take.
The tests themselves hold both sides to equal latents, where diffusers' scheduler can be given our noise levels.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import pytest
import torch
from benchmarks import test_autoencoder, test_unet_step
from benchmarks.timing import LAYOUTS, interleaved, times_faster
from torch import Tensor, nn

from ldm.base.device import default_device, reuse_freed_memory
from ldm.base.randomness import generator
from ldm.bayes.likelihoods.discrete import DiscretizedLogistic
from ldm.diffusion.options import Recipe
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL
from ldm.nets.unet import UNet

IMAGES, GUIDANCE, SIDE = 64, 2.0, 32
STEPS, EXACT_STEPS = 16, 20  # timed with the default schedule; compared, as a divisor of the 1000 timesteps
NETWORKS = {  # autoencoder and U-Net
    "default": (test_autoencoder.NETWORKS["default"][0], test_unet_step.NETWORKS["default"]),
    "64-128": (test_autoencoder.NETWORKS["32-64-64"][0], test_unet_step.NETWORKS["64-128"]),
}


@dataclass(frozen=True)
class Texts:
    """Embeddings in place of a text encoder: ten prompts and the empty one, (11, T, D)."""

    table: Tensor

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Of prompts "0" to "9" and ""."""
        text = self.table[[int(prompt or 10) for prompt in prompts]]
        return text, torch.ones(text.shape[:2], dtype=torch.bool)


def ours(folder: Path, texts: Texts) -> LatentDiffusion:
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae").place(default_device())
    unet = UNet.from_pretrained(folder / "unet").place(default_device())
    count = autoencoder.latent_channels
    recipe = Recipe(
        diffusion={"prediction": "v", "noise": {"kind": "scaled_linear"}},
        autoencoder="", preprocessing={"image_size": SIDE}, text={},
        latent_mean=[0.0] * count, latent_std=[1.0] * count, sampling=test_autoencoder.SETTINGS.sampling.model_dump(),
    )  # fmt: skip
    model = LatentDiffusion(autoencoder, DiscretizedLogistic().build().to(default_device()), unet, recipe)
    model.text_encoder = texts
    return model


def pipeline(folder: Path, layout: torch.memory_format, **spacing: Any) -> diffusers.StableDiffusionPipeline:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction", **spacing
    )
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").to(memory_format=layout)
    vae.register_to_config(scaling_factor=1.0)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").to(memory_format=layout),
        scheduler=scheduler,
        text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(default_device())  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Theirs:
    """The pipeline on the prompts' embeddings, from given noise."""

    def __init__(self, pipe: diffusers.StableDiffusionPipeline, texts: Texts, prompts: list[str]):
        self.pipe, device = pipe, pipe.unet.device
        self.text, self.empty = (texts(x)[0].to(device) for x in (prompts, [""] * len(prompts)))

    def __call__(self, noise: Tensor, steps: int, output: str = "pt") -> Tensor:
        return self.pipe(
            prompt_embeds=self.text, negative_prompt_embeds=self.empty, latents=noise, num_inference_steps=steps,
            guidance_scale=GUIDANCE, height=SIDE, width=SIDE, output_type=output,
        ).images  # fmt: skip


class Part:
    """Seconds that a module takes, and the rows of its calls' first arguments."""

    def __init__(self, module: nn.Module):
        self.seconds, self.rows, self._start = 0.0, 0, 0.0
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.rows += len(inputs[0])
        self._start = now()

    def _after(self, *_: Any) -> None:
        self.seconds += now() - self._start


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def check_latents(model: LatentDiffusion, theirs: Theirs, noise: Tensor, prompts: list[str], patch: pytest.MonkeyPatch) -> None:
    """The same latents from the same noise, at timesteps that both schedules have."""
    decoded: list[Tensor] = []
    decode = model.autoencoder.decode
    with patch.context() as context:
        context.setattr(model.autoencoder, "decode", lambda z: decoded.append(z) or decode(z))
        model.sample(prompts, schedule="uniform", sampler="dpmpp_2m", steps=EXACT_STEPS, guidance=GUIDANCE)
    expected = theirs(noise, EXACT_STEPS, "latent")
    torch.testing.assert_close(torch.cat(decoded)[-len(prompts) :], expected, rtol=1e-3, atol=1e-3)  # one was measured before


@pytest.mark.parametrize("network", NETWORKS)
def test_sampling(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images from noise and text embeddings, decoder included, against the pipeline in both layouts."""
    if default_device().type == "cpu":
        reuse_freed_memory()  # as the stages do; it serves both sides
    arguments, unet = NETWORKS[network]
    torch.manual_seed(0)
    AutoencoderKL(**arguments).save_pretrained(tmp_path / "vae")
    UNet(**unet.arguments).save_pretrained(tmp_path / "unet")
    texts = Texts(torch.randn(11, unet.tokens, unet.arguments["cross_attention_dim"]))
    prompts = [str(number % 10) for number in range(IMAGES)]
    model = ours(tmp_path, texts)
    noise = model.latent_noise([generator(0, "sample", number) for number in range(IMAGES)], model.latent_shape())
    trailing = Theirs(pipeline(tmp_path, torch.contiguous_format, timestep_spacing="trailing"), texts, prompts)
    check_latents(model, trailing, noise, prompts, monkeypatch)

    passes: dict[str, Callable[[], Tensor]] = {"ours": lambda: model.sample(prompts, steps=STEPS, guidance=GUIDANCE)}
    parts = {"ours": {"U-Net": model.unet, "decoder": model.autoencoder.decoder}}
    for name, layout in LAYOUTS.items():
        theirs = Theirs(pipeline(tmp_path, layout, use_karras_sigmas=True), texts, prompts)
        passes[f"diffusers {name}"] = partial(theirs, noise, STEPS)
        parts[f"diffusers {name}"] = {"U-Net": theirs.pipe.unet, "decoder": theirs.pipe.vae.decoder}
    seconds = interleaved(passes)
    versions = f"{torch.get_num_threads()} threads, torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"\nsampling {IMAGES} images in {STEPS} steps, {network}, {default_device()}, {versions}")
    work = []
    for name, run in passes.items():
        taken = {part: Part(module) for part, module in parts[name].items()}
        start = now()
        run()
        whole = now() - start
        work.append({part: found.rows for part, found in taken.items()})
        shares = ", ".join(f"{part} {found.seconds / whole:.0%}" for part, found in taken.items())
        ratio = f", ratio {times_faster(seconds['ours'], seconds[name]):.2f}" if name != "ours" else ""
        print(f"  {name}: {median(seconds[name]) * 1e3:.0f} ms ({shares}){ratio}", flush=True)
    assert work == [{"U-Net": 2 * STEPS * IMAGES, "decoder": IMAGES}] * len(work)
