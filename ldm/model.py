"""The trained system as one object: autoencoder, likelihood, U-Net, text encoder and what ties them together."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.files import replacing
from ldm.base.hashing import canonical_json
from ldm.base.options import chosen
from ldm.base.pixels import to_float, to_uint8
from ldm.base.randomness import generator
from ldm.bayes.bound import Bound, whole_bound
from ldm.bayes.likelihoods.likelihood import Likelihood, load_likelihood
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance, autoguidance, classifier_free
from ldm.diffusion.options import Diffusion, Sampling, changed_sampling
from ldm.diffusion.samplers.sampler import DenoiseFn
from ldm.nets.autoencoder import Autoencoder, DiagonalGaussian, VQModel, load_autoencoder
from ldm.nets.backbones.backbone import load_backbone
from ldm.nets.diffusers import Pretrained
from ldm.nets.text.encoder import TextEncoder, trim
from ldm.nets.text.options import Text
from ldm.nets.tiling import decode_tiled, encode_tiled

BATCH = 128  # images at a time
SMALLEST_TILE = 8  # latents: with fewer, a tile is mostly edge


@dataclass(frozen=True)
class Recipe:
    """What the weights alone do not say; `model.json` of a saved system."""

    diffusion: dict[str, Any]  # `ldm.diffusion.options.Diffusion`
    autoencoder: str  # hash of the autoencoder whose latents the U-Net was trained on
    preprocessing: dict[str, Any]  # of ldm.data.images.Preprocessing
    latent_mean: list[float]  # per channel; standardises the latents
    latent_std: list[float]
    text: dict[str, Any]  # options of the text encoder, and sha256 of its files
    sampling: dict[str, Any]  # defaults, `ldm.diffusion.options.Sampling`

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Recipe":
        """The values of a `model.json`, also of one that was saved before choices had options of their own."""
        return cls(**(values if "diffusion" in values else _from_flat(values)))


def _from_flat(values: dict[str, Any]) -> dict[str, Any]:
    """Today's form of the first `model.json`: options of all choices side by side, some of them added later than others."""
    kept = {name: values[name] for name in ("autoencoder", "preprocessing", "latent_mean", "latent_std")}
    noise = {"kind": values["noise"], "sigma_max": values["sigma_max"]}
    noise |= {name: values[name] for name in ("shift", "zero_terminal_snr") if values.get(name, 1.0) not in (1.0, False)}
    encoder, max_tokens = values["text"]["encoder"], values["text"]["max_tokens"]
    text = {"kind": "minilm"} if encoder == "minilm" else {"kind": "transformers", "model": encoder}
    flat = {"schedule": "karras", "guidance_interval": None, "guidance_rescale": 0.0} | values["sampling"]
    eta, churn, sampler = flat.pop("eta", 0.0), flat.pop("churn", 0.0), {"kind": flat.pop("sampler")}
    sampler |= {"ddim": {"eta": eta}, "heun": {"churn": churn}}.get(sampler["kind"], {})
    return kept | {
        "diffusion": {"prediction": values["kind"], "noise": noise},
        "text": {"options": {**text, "max_tokens": max_tokens}, "sha256": values["text"]["sha256"]},
        "sampling": {"sampler": sampler, **flat},
    }


class LatentDiffusion:
    """A trained latent diffusion model (Rombach et al. 2022). Images cross its edges as uint8 (N, C, H, W)."""

    def __init__(self, autoencoder: Autoencoder, likelihood: Likelihood, unet: Pretrained, recipe: Recipe):
        self.autoencoder, self.likelihood, self.unet, self.recipe = autoencoder, likelihood, unet, recipe
        diffusion = Diffusion.model_validate(recipe.diffusion)
        self.levels = diffusion.noise.build()
        self.denoiser = Denoiser(unet, diffusion.prediction, self.levels)
        for module in (autoencoder, likelihood, unet):
            module.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> "LatentDiffusion":
        """Read a folder that `save` wrote; `InputError` where it is not one."""
        folder = Path(folder)
        try:
            recipe = Recipe.read(json.loads((folder / "model.json").read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{folder}: holds no model.json; give a folder that evaluate or LatentDiffusion.save wrote"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder / 'model.json'}: not a model of this version: {error}") from None
        return cls(
            load_autoencoder(folder / "autoencoder").place(device),
            load_likelihood(folder / "autoencoder").to(device),
            load_backbone(folder / "unet").place(device),
            recipe,
        )

    def save(self, folder: Path | str) -> None:
        """Write the system as safetensors and JSON, all or nothing; equal models give equal bytes.

        Replaces a saved model, and refuses to replace anything else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / "model.json").is_file() and (folder.is_file() or any(folder.iterdir())):
            raise InputError(f"{folder}: exists and is not a saved model; name another folder")
        with replacing(folder) as partial:
            self.autoencoder.save_pretrained(partial / "autoencoder")
            self.likelihood.save_pretrained(partial / "autoencoder")
            self.unet.save_pretrained(partial / "unet")
            (partial / "model.json").write_text(canonical_json(asdict(self.recipe)))

    @property
    def device(self) -> torch.device:
        return self.likelihood.log_scale.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.recipe.preprocessing["image_size"]
        return self.autoencoder.latent_shape(side, side)

    def latent_noise(self, rngs: Sequence[torch.Generator]) -> Tensor:
        """Standard normal noise (N, c, h, w) for as many latents, each from its own generator."""
        return torch.stack([torch.randn(self.latent_shape, generator=rng) for rng in rngs]).to(self.device)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder the model was trained with, checked by hash."""
        return chosen(Text, self.recipe.text["options"]).build(self.recipe.text["sha256"])

    @torch.inference_mode()
    def encode(self, images: Tensor, tile: int | None = None) -> DiagonalGaussian:
        """Posterior over latents (unstandardised) of uint8 images (N, C, H, W).

        `tile`: side in pixels of the tiles that large images are worked on by, overlapping by a quarter; see `ldm.nets.tiling`.
        """
        if tile:
            return encode_tiled(self.autoencoder, to_float(images), tile, self._overlap(tile))
        return self.autoencoder.encode(to_float(images).to(self.device))

    @torch.inference_mode()
    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Mean images, uint8 (N, C, H, W), of latents (N, c, h, w); `tile` as in `encode`."""
        if tile:
            whole = decode_tiled(self.autoencoder, latents.cpu(), tile, self._overlap(tile))
            return to_uint8(self.likelihood.mean(whole.to(self.device))).cpu()
        parts = [self.likelihood.mean(self.autoencoder.decode(part.to(self.device))) for part in latents.split(BATCH)]
        return to_uint8(torch.cat(parts)).cpu()

    @torch.inference_mode()
    def sample_prior(self, n: int, *, seed: int = 0) -> Tensor:
        """Ancestral samples of the autoencoder alone, uint8 (n, C, H, W): z ~ p(z), x ~ p(x | z).

        p(z) is the standard normal, or of a VQ model uniform over its codes; no diffusion model and no prompt is involved.
        """
        rngs = [generator(seed, "prior", i) for i in range(n)]
        if isinstance(self.autoencoder, VQModel):
            codes = self.autoencoder.quantize.embedding.weight
            places = self.latent_shape[1:]
            drawn = torch.stack([torch.randint(len(codes), places, generator=rng) for rng in rngs]).to(self.device)
            z = codes[drawn].permute(0, 3, 1, 2)
        else:
            z = self.latent_noise(rngs)
        images = [
            self.likelihood.sample(self.autoencoder.decode(z[i : i + 1]), rng) for i, rng in enumerate(rngs)
        ]  # one by one: the draw of image i depends on no other
        return to_uint8(torch.cat(images)).cpu()

    @torch.inference_mode()
    def traverse(self, image: Tensor, n: int, *, reach: float = 3.0) -> Tensor:
        """What each latent channel does to a uint8 image (C, H, W): uint8 (channels · n, C, H, W), channel by channel.

        The channel is shifted everywhere, by `n` steps from -reach to reach of its standard deviations over the data.
        """
        _, std = self._affine
        mean = self.encode(image[None]).mean  # (1, c, h, w)
        channels = mean.shape[1]
        steps = torch.linspace(-reach, reach, n, device=self.device)
        shifts = torch.einsum("ij,n->inj", torch.eye(channels, device=self.device), steps).flatten(0, 1) * std.view(1, -1)
        return self.decode(mean + shifts[:, :, None, None])

    def _overlap(self, tile: int) -> int:
        factor = self.autoencoder.factor
        if tile % factor or tile < SMALLEST_TILE * factor:
            raise InputError(f"tile {tile}: use a multiple of {factor} pixels, {SMALLEST_TILE * factor} or more")
        return tile // 4 // factor * factor

    @torch.inference_mode()
    def sample(
        self,
        prompts: list[str],
        *,
        negative: str = "",
        guide: "LatentDiffusion | None" = None,
        seed: int = 0,
        first: int = 0,
        **sampling: Any,
    ) -> Tensor:
        """One image a prompt, uint8 (N, C, H, W); `sampling` (`ldm.diffusion.options.Sampling`) changes the model's defaults.

        Guidance leads away from the prompt `negative`, or, where `guide` is given, from that weaker model of the same latents.
        Images are numbered, from `first` on: each depends on (seed, number) and its prompt alone, whatever is drawn beside it,
        so that a batch can be divided in any way.
        """
        return self.decode(self.sample_latents(prompts, negative=negative, guide=guide, seed=seed, first=first, **sampling))

    @torch.inference_mode()
    def sample_latents(
        self,
        prompts: list[str],
        *,
        negative: str = "",
        guide: "LatentDiffusion | None" = None,
        seed: int = 0,
        first: int = 0,
        **sampling: Any,
    ) -> Tensor:
        """The latents (N, c, h, w) that `sample` decodes."""
        options = changed_sampling(self.recipe.sampling, sampling)
        if first < 0:
            raise InputError(f"first {first}: images are numbered from 0")
        if options.guidance == 1 and (negative or guide is not None):
            raise InputError("guidance 1 leads nowhere: with a negative prompt or a guiding model, set another value")
        if guide is not None:
            if negative:
                raise InputError("guidance leads away from a negative prompt or from a weaker model; give one of the two")
            of = [(r.autoencoder, r.latent_mean, r.latent_std) for r in (self.recipe, guide.recipe)]
            if of[0] != of[1]:
                raise InputError("the guiding model was trained on other latents; take one of the same autoencoder and data")
        text = self._embed([*prompts, negative])
        weaker = None if guide is None else (guide, *guide._embed(prompts))
        return self._sample_latents(*text, options, seed, range(first, first + len(prompts)), weaker)

    @torch.inference_mode()
    def interpolate(
        self, a: str | Tensor, b: str | Tensor, n: int, *, linear: bool = False, seed: int = 0, **sampling: Any
    ) -> Tensor:
        """`n` images from `a` to `b`, uint8 (n, C, H, W).

        Two uint8 images (C, H, W) are joined by a great circle between their standardised latent means, or by a line
        where `linear`; two prompts by a line between their token embeddings, every image sampled from the same starting noise.
        """
        weights = torch.linspace(0, 1, n, device=self.device)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            shift, scale = self._affine
            first, last = ((self.encode(x[None]).mean - shift) / scale for x in (a, b))
            path = torch.lerp(first, last, weights.view(-1, 1, 1, 1)) if linear else slerp(first, last, weights)
            return self.decode(path * scale + shift)
        if not (isinstance(a, str) and isinstance(b, str)):
            raise InputError("interpolate between two prompts or two images, not one of each")
        (first, last, empty), masks = self._embed([a, b, ""])
        context = torch.lerp(first.expand(n, -1, -1), last.expand(n, -1, -1), weights.view(-1, 1, 1))
        context = torch.cat([context, empty[None]])
        w = weights[:, None]  # the ends attend to their own tokens only: they are what `sample` draws
        mask = torch.cat([(masks[0] & (w < 1)) | (masks[1] & (w > 0)), masks[2:]])
        options = changed_sampling(self.recipe.sampling, sampling)
        return self.decode(self._sample_latents(context, mask, options, seed, [0] * n))

    @torch.inference_mode()
    def bound(self, images: Tensor, prompts: list[str], *, levels: int, seed: int = 0, keys: list[str] | None = None) -> Bound:
        """A lower bound on log p(image | prompt) of uint8 images (N, C, H, W); see `ldm.bayes.bound`.

        `levels` noise levels an image; the draws of an image come from (seed, its key), so that two models are
        compared under the same noise. The weights are those of this model (EMA, if it was trained with one).
        """
        keys = keys or [str(i) for i in range(len(images))]
        shift, scale = self._affine
        context, mask = self._embed(prompts)
        rngs = [generator(seed, "bound", key) for key in keys]
        latent_noise = self.latent_noise(rngs)
        noise = torch.stack([torch.randn((levels, *self.latent_shape), generator=rng) for rng in rngs], 1).to(self.device)
        # Stratified over ln sigma: one draw in each of `levels` equal parts.
        u = torch.stack([(torch.arange(levels) + torch.rand(levels, generator=rng)) / levels for rng in rngs], 1)
        return whole_bound(
            self.autoencoder,
            self.likelihood,
            self._under(context, mask),
            to_float(images).to(self.device),
            latent_mean=shift,
            latent_std=scale,
            sigma_min=self.levels.sigma_min,
            sigma_max=self.levels.sigma_max,
            latent_noise=latent_noise,
            u=u.to(self.device),
            noise=noise,
        )

    @torch.inference_mode()
    def bound_latents(self, images: Tensor, keys: list[str], *, seed: int = 0) -> Tensor:
        """The draws from q(z | x), (N, c, h, w), that `bound` makes for uint8 images (N, C, H, W) of these keys."""
        return self.encode(images).sample(self.latent_noise([generator(seed, "bound", key) for key in keys]))

    @property
    def _affine(self) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=self.device) for v in (self.recipe.latent_mean, self.recipe.latent_std)
        )
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def _embed(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        distinct = list(dict.fromkeys(prompts))
        text, mask = self.text_encoder(distinct)
        text, mask = trim(text, mask)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return text[rows].to(self.device), mask[rows].to(self.device)

    def _under(self, context: Tensor, mask: Tensor) -> DenoiseFn:
        return partial(self.denoiser, context=context, context_mask=mask)

    def _noise(self, seed: int, numbers: Sequence[int], *step: int) -> Tensor:
        """What images of these numbers start from, or are given at a step, (N, c, h, w)."""
        return self.latent_noise([generator(seed, "sample", number, *step) for number in numbers])

    def _sample_latents(
        self,
        context: Tensor,
        mask: Tensor,
        options: Sampling,
        seed: int,
        numbers: Sequence[int],
        weaker: "tuple[LatentDiffusion, Tensor, Tensor] | None" = None,
    ) -> Tensor:
        """Latents (N, c, h, w) under `context` (N + 1, T, D), whose last row is what guidance leads away from.

        Or it leads away from the model `weaker`, under its own context (N, T, D).
        """
        sigmas = self.levels.grid(options.schedule, options.steps)
        guidance = Guidance(options.guidance, options.guidance_interval, options.guidance_rescale)
        sampler = options.sampler.build(self.levels.sigma_max)
        deviation = math.sqrt(1 + float(sigmas[0]) ** 2)  # of standardised latents under that much noise; as in the bound
        latents = []
        for start in range(0, len(numbers), BATCH):
            part = slice(start, min(start + BATCH, len(numbers)))
            text, numbers_part = (context[part], mask[part]), numbers[part]
            if weaker:
                other, *other_text = weaker
                guided = autoguidance(self._under(*text), other._under(*(t[part] for t in other_text)), guidance)
            else:
                guided = classifier_free(self.denoiser, guidance, *text, context[-1], mask[-1])
            x = (self._noise(seed, numbers_part) * deviation).contiguous(memory_format=torch.channels_last)
            latents.append(sampler(guided, x, sigmas, partial(self._noise, seed, numbers_part)))
        shift, scale = self._affine
        return torch.cat(latents) * scale + shift


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation between a and b (1, …) at `weights` (n,), (n, …); a line where they are parallel or opposite."""
    cosine = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = cosine.acos()
    w = weights.view(-1, *[1] * (a.ndim - 1))
    if torch.sin(angle) < 1e-4:
        return torch.lerp(a, b, w)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)
