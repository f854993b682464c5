"""The trained system as one object: autoencoder, likelihood, denoising network, text encoder and the recipe that joins them."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.files import canonical_json, replacing
from ldm.base.memory import Parts
from ldm.base.options import chosen
from ldm.base.pixels import to_float, to_uint8
from ldm.base.randomness import generator
from ldm.bayes.bound import Bound, whole_bound
from ldm.bayes.likelihoods.likelihood import Likelihood, load_likelihood
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance, autoguidance, classifier_free
from ldm.diffusion.options import Diffusion, Recipe, Sampling, changed_sampling, check_guided, read_recipe
from ldm.diffusion.samplers.sampler import DenoiseFn
from ldm.nets.autoencoder import Autoencoder, DiagonalGaussian, VQModel, load_autoencoder
from ldm.nets.backbone import load_backbone
from ldm.nets.diffusers import Pretrained
from ldm.nets.text.encoder import Text, TextEncoder, files_of
from ldm.nets.tiling import decode_tiled, encode_tiled

TEXT_ENCODER = "text_encoder"  # folder of a saved model with the files of its text encoder, unless it names a wheel or the hub
SMALLEST_TILE = 8  # latents; smaller tiles are mostly edge
Size = tuple[int, int]  # height and width of images, in pixels
Embedded = tuple[Tensor, Tensor]  # token embeddings (N, T, D) and the mask of real tokens (N, T)
Weaker = tuple["LatentDiffusion", Embedded]  # a model that guidance leads away from, and its embedding of N prompts


class LatentDiffusion:
    """A trained latent diffusion model (Rombach et al. 2022). Images are uint8 (N, C, H, W), given and returned."""

    def __init__(
        self, autoencoder: Autoencoder, likelihood: Likelihood, unet: Pretrained, recipe: Recipe, root: Path = Path()
    ):  # fmt: skip
        """A text encoder that the recipe names by a relative folder lies below `root`."""
        self.autoencoder, self.likelihood, self.unet, self.recipe = autoencoder, likelihood, unet, recipe
        self._parts: dict[str, Parts] = {}  # by what is computed
        self.text: Text = chosen(Text, recipe.text["options"]).located(root)
        diffusion = Diffusion.model_validate(recipe.diffusion)
        self.levels = diffusion.noise.build()
        self.denoiser = Denoiser(unet, diffusion.prediction, self.levels)
        for module in (autoencoder, likelihood, unet):
            module.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> "LatentDiffusion":
        """Read a folder that `save` wrote; `InputError` if it is none, or if files are lost or damaged."""
        folder = Path(folder)
        recipe, carried = read_recipe(folder), folder / TEXT_ENCODER
        autoencoder = load_autoencoder(folder / "autoencoder").place(device)
        likelihood = load_likelihood(folder / "autoencoder").to(device)
        system = cls(autoencoder, likelihood, load_backbone(folder / "unet").place(device), recipe)
        if carried.is_dir():
            system.text = system.text.model_copy(update={"model": str(carried.resolve())})
            system.text_encoder = system.text.build(recipe.text["sha256"], device)  # now: the folder may be a temporary copy
        return system

    def save(self, folder: Path | str) -> None:
        """Write safetensors and JSON, all or nothing; equal models give equal bytes. `InputError` if other files are there.

        The files of a text encoder that a folder holds are saved, too: that folder is not everywhere, and may change.
        """
        folder, text = Path(folder), self.text.folder()
        if folder.exists() and not (folder / "model.json").is_file() and (folder.is_file() or any(folder.iterdir())):
            raise InputError(f"{folder}: exists and is not a saved model; name another folder")
        with replacing(folder) as partial:
            self.autoencoder.save_pretrained(partial / "autoencoder")
            self.likelihood.save_pretrained(partial / "autoencoder")
            self.unet.save_pretrained(partial / "unet")
            (partial / "model.json").write_text(canonical_json(asdict(self.recipe)))
            if text:
                (partial / TEXT_ENCODER).mkdir()
                for file in files_of(text):
                    shutil.copyfile(file, partial / TEXT_ENCODER / file.name)

    @property
    def device(self) -> torch.device:
        return self.likelihood.log_scale.device

    def latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """Of the latents of images of this size, by default the square of the data; `InputError` if no latents have it."""
        size, factor = size or (self.recipe.preprocessing["image_size"],) * 2, self.autoencoder.factor
        if not (isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int) for side in size)):
            raise InputError(f"size {size!r}: give a pair of whole numbers, (height, width)")
        height, width = size
        if min(height, width) < 1 or height % factor or width % factor:
            near = " x ".join(str(max(1, round(side / factor)) * factor) for side in (width, height))
            raise InputError(f"size {width} x {height}: sides have to be multiples of {factor}, as {near}")
        return self.autoencoder.latent_shape(height, width)

    def divided(self, what: str) -> Parts:
        """Divides the computation of `what` into parts that fit into memory."""
        return self._parts.setdefault(what, Parts(self.device))

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder that the model was trained with; `InputError` if its files have another hash."""
        return self.text.build(self.recipe.text["sha256"], self.device)

    @torch.inference_mode()
    def encode(self, images: Tensor, tile: int | None = None) -> DiagonalGaussian:
        """q(z | x) over latents, not standardised, of images (N, C, H, W), by tiles of `tile` pixels (`ldm.nets.tiling`)."""
        if tile:
            return encode_tiled(self.autoencoder, to_float(images), tile, self._overlap(tile))
        parts = self.divided("encode")(
            lambda part: self.autoencoder.encode(to_float(images[part]).to(self.device)), len(images), kind=images.shape[1:]
        )
        found = [(q.mean, q.logvar) for q in parts]
        return DiagonalGaussian(*(torch.cat(moments) for moments in zip(*found, strict=True)))

    @torch.inference_mode()
    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """E[x | z] as images (N, C, H, W), for latents (N, c, h, w); `tile` as in `encode`."""
        if tile:
            decoded = decode_tiled(self.autoencoder, latents.cpu(), tile, self._overlap(tile)).to(self.device)
            return to_uint8(self.likelihood.mean(decoded)).cpu()

        def images(part: slice) -> Tensor:
            return to_uint8(self.likelihood.mean(self.autoencoder.decode(latents[part].to(self.device)))).cpu()

        return torch.cat(list(self.divided("decode")(images, len(latents), kind=latents.shape[1:])))

    def _overlap(self, tile: int) -> int:
        factor = self.autoencoder.factor
        if tile % factor or tile < SMALLEST_TILE * factor:
            raise InputError(f"tile {tile}: use a multiple of {factor} pixels, {SMALLEST_TILE * factor} or more")
        return tile // 4 // factor * factor

    @torch.inference_mode()
    def sample_prior(self, n: int, *, seed: int = 0) -> Tensor:
        """Images (n, C, H, W) of the autoencoder alone: x ~ p(x | z), z ~ p(z), standard normal or uniform over a VQ's codes."""
        rngs = [generator(seed, "prior", i) for i in range(n)]
        if isinstance(self.autoencoder, VQModel):
            codes, places = self.autoencoder.quantize.embedding.weight, self.latent_shape()[1:]
            drawn = torch.stack([torch.randint(len(codes), places, generator=rng) for rng in rngs]).to(self.device)
            z = codes[drawn].permute(0, 3, 1, 2)
        else:
            z = self.latent_noise(rngs, self.latent_shape())
        # One by one, so that no image depends on how many are drawn.
        images = [self.likelihood.sample(self.autoencoder.decode(z[i : i + 1]), rng) for i, rng in enumerate(rngs)]
        return to_uint8(torch.cat(images)).cpu()

    @torch.inference_mode()
    def traverse(self, image: Tensor, n: int, *, reach: float = 3.0) -> Tensor:
        """Shift each latent channel of an image (C, H, W) in `n` steps, alike at all places: images (channels · n, C, H, W)."""
        steps = torch.linspace(-reach, reach, n, device=self.device)  # in standard deviations over the data
        shifts = (torch.diag(self._affine[1].flatten())[:, None] * steps[:, None]).flatten(0, 1)  # (channels · n, channels)
        return self.decode(self.encode(image[None]).mean + shifts[:, :, None, None])

    def sample(self, prompts: list[str], **options: Any) -> Tensor:
        """Draw an image for each prompt, (N, C, H, W); for the options, `size` among them, see `sample_latents`."""
        return self.decode(self.sample_latents(prompts, **options))

    @torch.inference_mode()
    def sample_latents(
        self, prompts: list[str], *, negative: str = "", guide: "LatentDiffusion | None" = None,
        size: Size | None = None, seed: int = 0, first: int = 0, **sampling: Any,
    ) -> Tensor:  # fmt: skip
        """Draw latents (N, c, h, w) for prompts, of images of this size; `sampling` changes the model's defaults.

        Its keys are those of `ldm.diffusion.options.Sampling`. Guidance leads away from the prompt `negative`, or from the weaker
        model `guide`, trained on the same latents.
        Images are numbered from `first` on. Each depends on its prompt, the seed and its number only, however a batch is divided.
        """
        options = changed_sampling(self.recipe.sampling, sampling)
        if first < 0:
            raise InputError(f"first {first}: images are numbered from 0")
        check_guided(self.recipe, options, negative, guide.recipe if guide else None)
        self.text_encoder.warn_of_cut([*prompts, negative])
        numbers, shape = range(first, first + len(prompts)), self.latent_shape(size)
        weaker = (guide, guide._embed(prompts)) if guide else None
        return self._sample_latents(self._embed([*prompts, negative]), options, seed, numbers, shape, weaker)

    @torch.inference_mode()
    def interpolate(
        self, a: str | Tensor, b: str | Tensor, n: int, *, linear: bool = False, seed: int = 0, **sampling: Any
    ) -> Tensor:
        """`n` images (n, C, H, W) between two images (C, H, W) or two prompts.

        Images are joined by a great circle between their standardised latent means, or by a line if `linear`; prompts by a line
        between their token embeddings, and every image starts from the same noise.
        """
        options, weights = changed_sampling(self.recipe.sampling, sampling), torch.linspace(0, 1, n, device=self.device)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape:
                found = " and ".join(f"{image.shape[2]} x {image.shape[1]}" for image in (a, b))
                raise InputError(f"interpolate between images of one size, not {found}")
            shift, scale = self._affine
            first, last = ((self.encode(x[None]).mean - shift) / scale for x in (a, b))
            path = torch.lerp(first, last, weights.view(-1, 1, 1, 1)) if linear else slerp(first, last, weights)
            return self.decode(path * scale + shift)
        if not (isinstance(a, str) and isinstance(b, str)):
            raise InputError("interpolate between two prompts or two images, not one of each")
        self.text_encoder.warn_of_cut([a, b])
        (first, last, empty), masks = self._embed([a, b, ""])
        context = torch.lerp(first.expand(n, -1, -1), last.expand(n, -1, -1), weights.view(-1, 1, 1))
        w = weights[:, None]  # the ends attend to their own tokens only: they are what `sample` draws
        mask = torch.cat([(masks[0] & (w < 1)) | (masks[1] & (w > 0)), masks[2:]])
        return self.decode(
            self._sample_latents((torch.cat([context, empty[None]]), mask), options, seed, [0] * n, self.latent_shape())
        )

    @torch.inference_mode()
    def bound(self, images: Tensor, prompts: list[str], *, levels: int, seed: int = 0, keys: list[str] | None = None) -> Bound:
        """A lower bound on log p(image | prompt) of images (N, C, H, W), by `levels` noise levels; random by seed and key."""
        rngs, shape = [generator(seed, "bound", key) for key in keys or map(str, range(len(images)))], self._shape_of(images)
        latent_noise = self.latent_noise(rngs, shape)  # the first draw, as in `bound_latents`
        noise = torch.stack([torch.randn((levels, *shape), generator=rng) for rng in rngs], 1)
        # stratified over ln sigma: one draw in each of `levels` equal parts
        u = torch.stack([(torch.arange(levels) + torch.rand(levels, generator=rng)) / levels for rng in rngs], 1)
        latent_mean, latent_std = self._affine
        return whole_bound(
            self.autoencoder, self.likelihood, self._conditioned(*self._embed(prompts)), to_float(images).to(self.device),
            latent_mean=latent_mean, latent_std=latent_std, sigma_min=self.levels.sigma_min, sigma_max=self.levels.sigma_max,
            latent_noise=latent_noise, u=u.to(self.device), noise=noise.to(self.device),
        )  # fmt: skip

    @torch.inference_mode()
    def bound_latents(self, images: Tensor, keys: list[str], *, seed: int = 0) -> Tensor:
        """The samples of q(z | x), (N, c, h, w), that `bound` takes for these images (N, C, H, W) and keys."""
        rngs = [generator(seed, "bound", key) for key in keys]
        return self.encode(images).sample(self.latent_noise(rngs, self._shape_of(images)))

    def latent_noise(self, rngs: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
        """Standard normal latents (N, c, h, w), each from its own generator."""
        return torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(self.device)

    def _shape_of(self, images: Tensor) -> tuple[int, int, int]:
        height, width = images.shape[2:]
        return self.latent_shape((height, width))

    def _conditioned(self, context: Tensor, mask: Tensor) -> DenoiseFn:
        return partial(self.denoiser, context=context, context_mask=mask)

    @property
    def _affine(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (1, c, 1, 1) each."""
        moments = torch.tensor([self.recipe.latent_mean, self.recipe.latent_std], dtype=torch.float32, device=self.device)
        return moments[0].view(1, -1, 1, 1), moments[1].view(1, -1, 1, 1)

    def _embed(self, prompts: list[str]) -> Embedded:
        return self.text_encoder(prompts)

    def _sample_latents(
        self, text: Embedded, options: Sampling, seed: int, numbers: Sequence[int], shape: tuple[int, int, int],
        weaker: "Weaker | None" = None,
    ) -> Tensor:  # fmt: skip
        """Latents (N, c, h, w) of these numbers under N + 1 texts. Guidance leads away from the last, or from `weaker`."""
        context, mask = text
        sigmas = self.levels.grid(options.schedule, options.steps)
        guidance = Guidance(options.guidance, options.guidance_interval, options.guidance_rescale)
        sampler = options.sampler.build(self.levels.sigma_max)
        deviation = math.sqrt(1 + float(sigmas[0]) ** 2)  # of standardised latents at the first noise level; as in the bound

        def guided(part: slice) -> DenoiseFn:
            if weaker:
                guide, (theirs, their_mask) = weaker
                other = guide._conditioned(theirs[part], their_mask[part])
                return autoguidance(self._conditioned(context[part], mask[part]), other, guidance)
            return classifier_free(self.denoiser, guidance, context[part], mask[part], context[-1], mask[-1])

        def latents(part: slice) -> Tensor:
            def noise(*step: int) -> Tensor:
                return self.latent_noise([generator(seed, "sample", number, *step) for number in numbers[part]], shape)

            x = (noise() * deviation).contiguous(memory_format=torch.channels_last)
            return sampler(guided(part), x, sigmas, noise)

        def one() -> Tensor:  # a guided estimate takes as much memory as any step
            level = next((s for s in sigmas[:-1] if guidance.at(s[None])), sigmas[0])
            return guided(slice(0, 1))(torch.zeros(1, *shape, device=self.device), level[None].float().to(self.device))

        kind = (shape, context.shape[1], guidance, weaker is None)
        found = torch.cat(list(self.divided("sample")(latents, len(numbers), kind=kind, one=one)))
        mean, std = self._affine
        return found * std + mean


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation between a and b (1, …) at `weights` (n,), (n, …); a line if they are parallel or opposite."""
    cosine = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle, w = cosine.acos(), weights.view(-1, *[1] * (a.ndim - 1))
    if torch.sin(angle) < 1e-4:
        return torch.lerp(a, b, w)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)
