"""`params.yaml` as frozen, validated settings: the one place that knows its keys.

Everything here changes results. What does not (device, threads, tracking address) is environment.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ldm.base.errors import InputError

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
HUB = r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}(/.+)?"  # ID@COMMIT[/SUBFOLDER]; a branch would not say which weights
Levels = Annotated[tuple[Positive, ...], Field(min_length=1)]  # channels of each level


class Section(BaseModel):
    """A frozen group of keys that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    source: Annotated[str, Field(pattern=r"^(digits|huggingface:.+)$")]  # what the `source` stage writes to data/raw/source
    path: Annotated[str, Field(min_length=1)]  # folder of images with captions, relative to the project root or absolute
    image_size: Positive  # pixels, the side of the square that models see
    margin: Annotated[int, Field(ge=0)]  # pixels stored beyond image_size, for the autoencoder's random crops
    channels: Literal[1, 3]  # greyscale or RGB
    fit: Literal["cover", "contain", "stretch"]  # how an image becomes square
    resize_filter: Literal["lanczos", "bicubic", "bilinear", "box"]
    background: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]  # behind transparency, and beside a contained image
    min_side: Positive  # pixels; smaller images are quarantined
    max_pixels: Annotated[int, Field(gt=0, le=178_956_970)]  # larger ones too; Pillow itself refuses beyond this bound
    val_fraction: Fraction
    test_fraction: Fraction
    shard_size: Positive  # images per shard at most
    max_bad_fraction: Fraction  # more unreadable images than this stop the `shard` stage

    @model_validator(mode="after")
    def _train_remains(self) -> "Data":
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must leave images to train on (sum below 1)")
        return self


class Text(Section):
    encoder: str  # "minilm" (shipped in a wheel), a local folder, or ID@COMMIT on the hub; loaded with transformers, frozen
    max_tokens: Positive


class Autoencoder(Section):
    """Mostly constructor arguments of `ldm.nets.AutoencoderKL`; each channel entry after the first halves the resolution."""

    # a folder in diffusers' format, ID@COMMIT[/SUBFOLDER] on the hub, or models:/NAME/VERSION
    pretrained: Annotated[str, Field(min_length=1)] | None
    regulariser: Literal["kl", "vq"]  # AutoencoderKL or VQModel
    latent_channels: Positive
    block_out_channels: Levels
    layers_per_block: Positive
    norm_num_groups: Positive
    attention: tuple[
        Annotated[int, Field(ge=0, strict=True)], ...
    ]  # levels, 0 the finest, whose resnets are followed by attention
    mid_block_add_attention: bool
    num_vq_embeddings: Positive  # codes of a VQModel
    optimizer: Literal["adamw", "sgld"]  # in train_vae; sgld: see train_vae.sgld

    @model_validator(mode="after")
    def _says_what_stays(self) -> "Autoencoder":
        last = len(self.block_out_channels) - 1
        if any(level > last for level in self.attention) or len(set(self.attention)) < len(self.attention):
            raise ValueError(f"attention is {list(self.attention)}; name levels once each, of 0 to {last} in block_out_channels")
        if (self.pretrained or "").startswith("models:/") and not re.fullmatch(r"models:/[\w.-]+/\d+", self.pretrained or ""):
            raise ValueError(
                f"pretrained {self.pretrained} may change its meaning; write models:/NAME/VERSION (`ldm registry show` names it)"
            )
        return self


class Optimizer(Section):
    """AdamW with linear warm-up and cosine decay, all counted in images."""

    images: Annotated[int, Field(ge=0)]  # images seen in training
    batch_size: Positive
    lr: Rate
    warmup_images: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    ema_halflife_images: Annotated[int, Field(ge=0)]  # 0 switches the average off
    checkpoint_images: Positive  # images between checkpoints (and metric deliveries)


class LdmObjective(Section):
    """The latent diffusion paper's objective, for `train_vae.objective: ldm`; see `ldm.training.adversarial`."""

    perceptual: Annotated[str, Field(min_length=1)]  # random, or a file of VGG-16 weights
    perceptual_sha256: str | None  # of that file
    perceptual_weight: Annotated[float, Field(ge=0)]
    discriminator_weight: Annotated[float, Field(ge=0)]  # 0 leaves it out
    discriminator_start: Annotated[int, Field(ge=0)]  # images seen before it joins
    discriminator_channels: Positive
    discriminator_layers: Positive

    @model_validator(mode="after")
    def _a_file_has_a_hash(self) -> "LdmObjective":
        if (self.perceptual == "random") != (self.perceptual_sha256 is None):
            raise ValueError("perceptual_sha256 is the sha256 of the file that perceptual names, and null for `random`")
        return self


class Langevin(Section):
    """What stochastic gradient Langevin dynamics samples; see `ldm.langevin.sgld`."""

    prior_precision: Annotated[float, Field(ge=0)]  # of a Gaussian prior of the weights; 0 is flat
    temperature: Annotated[float, Field(ge=0)]  # 1 is the posterior


class TrainVae(Optimizer):
    objective: Literal["elbo", "ldm"]
    likelihood: Literal["discretized_logistic", "discretized_gaussian", "gaussian", "laplace", "bernoulli"]
    scale: Literal["learned", "fixed", "per_pixel"]  # of the likelihood; per_pixel comes from the decoder
    log_scale: float  # where it is fixed, or starts
    beta: Annotated[float, Field(ge=0)]  # weight of the KL term in the objective; reported ELBOs have beta = 1
    beta_warmup_images: Annotated[int, Field(ge=0)]  # images over which beta rises from 0
    free_bits: Annotated[float, Field(ge=0)]  # nats that a latent channel of an image costs at least
    flip: bool  # half of the images are mirrored, at random
    shuffle: Literal["global", "shard"]  # "shard" reads shard by shard, for shards that do not fit on this disk
    sgld: Langevin
    ldm: LdmObjective

    @model_validator(mode="after")
    def _likelihood_fits(self) -> "TrainVae":
        if self.objective == "ldm" and (self.likelihood, self.scale) != ("laplace", "learned"):
            raise ValueError("objective ldm is absolute error with a learned scale: set likelihood: laplace and scale: learned")
        if self.scale == "per_pixel" and not self.likelihood.endswith(("gaussian", "logistic")):
            raise ValueError(f"scale per_pixel needs a Gaussian or logistic likelihood, found {self.likelihood}")
        return self


class CacheLatents(Section):
    flip: bool  # training images are encoded a second time, mirrored


class Unet(Section):
    """Constructor arguments of `ldm.nets.UNet`."""

    block_out_channels: Levels
    layers_per_block: Positive
    attention: tuple[Literal["none", "self", "cross"], ...]  # a level each; the middle is always "cross", and so reads the text
    transformer_layers_per_block: Positive
    num_heads: Positive
    norm_num_groups: Positive
    qk_norm: bool

    @model_validator(mode="after")
    def _a_kind_per_level(self) -> "Unet":
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError("attention needs none, self or cross for each entry of block_out_channels")
        return self


class Diffusion(Section):
    kind: Literal["eps", "x0", "v", "edm", "flow"]  # what the network predicts; see ldm/diffusion/denoiser.py
    # training noise levels; see ldm/diffusion/noise.py
    noise: Literal["linear", "scaled_linear", "cosine", "lognormal", "logitnormal", "loguniform", "uniform"]
    sigma_max: Annotated[float, Field(ge=1)]  # noise levels stop here; latents have unit variance
    # multiplies noise levels; side of the latents over the side that the schedule was made for
    shift: Annotated[float, Field(ge=1 / 16, le=16)]
    zero_terminal_snr: bool  # the last timestep is noise alone

    @model_validator(mode="after")
    def _noise_can_be_so(self) -> "Diffusion":
        if self.zero_terminal_snr and self.kind == "eps":
            raise ValueError(
                "zero_terminal_snr: kind eps has nothing to learn from noise alone; take another kind, or set it false"
            )
        if self.zero_terminal_snr and self.noise not in ("linear", "scaled_linear", "cosine"):
            raise ValueError(f"zero_terminal_snr rescales a table of timesteps; noise {self.noise} has none: set it false")
        if self.shift != 1 and self.noise == "loguniform":
            raise ValueError("shift changes nothing for noise loguniform, whose ends stay where they are; set it to 1")
        return self


class Sampling(Section):
    """Defaults of the registered model; see `ldm.diffusion.samplers` and `ldm.diffusion.guidance`."""

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "langevin"]
    schedule: Literal["karras", "exponential", "uniform"]  # how the noise levels of the steps are spaced
    steps: Positive
    eta: Annotated[float, Field(ge=0, le=1)]  # of ddim: 0 is deterministic, 1 is ddpm
    churn: Annotated[float, Field(ge=0)]  # of heun: noise added on the way
    guidance: Annotated[float, Field(ge=0)]  # 1 is no guidance
    guidance_interval: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None  # noise levels with guidance
    guidance_rescale: Annotated[float, Field(ge=0, le=1)]  # how far guided estimates get back the unguided ones' deviation

    @model_validator(mode="after")
    def _interval_is_one(self) -> "Sampling":
        if self.guidance_interval and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval is {list(self.guidance_interval)}; give the lower noise level first, or null")
        return self

    @model_validator(mode="after")
    def _options_are_the_samplers(self) -> "Sampling":
        for name, sampler in (("eta", "ddim"), ("churn", "heun")):
            if getattr(self, name) and self.sampler != sampler:
                raise ValueError(f"{name} is an option of {sampler}; set it to 0 with sampler {self.sampler}")
        return self


class TrainUnet(Optimizer):
    caption_dropout: Fraction  # share of captions replaced by the empty one, for classifier-free guidance
    loss_weight: Literal["standard", "min_snr", "learned"]  # of noise levels; see ldm/training/unet.py
    min_snr_gamma: Rate


class Evaluate(Section):
    samples: Annotated[int, Field(ge=2)]  # images drawn for accuracy, variance and Fréchet distance
    unseen_samples: Positive  # images drawn for the prompts of prompts.csv
    features: Positive  # dimensions of the feature space of the Fréchet distance
    bound_levels: Positive  # noise levels a test image, for the diffusion term of the bound
    importance_samples: Positive  # posterior samples a test image, for the autoencoder's importance-weighted bound


class Posterior(Langevin):
    """How the stages `sample_posterior` sample weights of the decoder."""

    part: (
        Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None
    )  # modules of the decoder; null: its last block and output
    lr: Rate | None  # step size; null: measured, see `ldm.langevin.step_size`
    temperature: Annotated[float, Field(gt=0)]  # 1 is the posterior; step sizes are measured against its noise
    friction: Annotated[float, Field(gt=0, le=1)]  # of sghmc
    chains: Annotated[int, Field(ge=2)]
    batch_size: Positive  # images of a step of a chain
    burn_in: Annotated[int, Field(ge=0)]  # steps before the first draw
    thin: Positive  # steps from one draw to the next
    draws: Annotated[int, Field(ge=4)]  # of each chain


class Registry(Section):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    level: Annotated[float, Field(gt=0, lt=0.5)]  # chance of promoting an equal model; see ldm/evaluation/gate.py


class Settings(Section):
    seed: Annotated[int, Field(ge=0)]
    deterministic: bool
    precision: Literal["auto", "fp32", "bf16"]  # of training; auto is bf16 on a GPU that has it, else fp32
    compile: bool  # training through torch.compile
    data: Data
    text: Text
    autoencoder: Autoencoder
    train_vae: TrainVae
    cache_latents: CacheLatents
    unet: Unet
    diffusion: Diffusion
    train_unet: TrainUnet
    sampling: Sampling
    evaluate: Evaluate
    sample_posterior: tuple[Literal["sgld", "sghmc"], ...]  # samplers; each is a stage
    posterior: Posterior
    registry: Registry

    @property
    def latent_size(self) -> int:
        """Side of the latents in pixels: the image's over the autoencoder's downsampling factor."""
        return self.data.image_size // 2 ** (len(self.autoencoder.block_out_channels) - 1)

    @model_validator(mode="after")
    def _sizes_divide(self) -> "Settings":
        factor = 2 ** (len(self.autoencoder.block_out_channels) - 1)
        if self.data.image_size % factor:
            raise ValueError(f"data.image_size {self.data.image_size} is not a multiple of the autoencoder's factor {factor}")
        levels = len(self.unet.block_out_channels) - 1
        if self.latent_size % 2**levels:
            raise ValueError(f"latents of side {self.latent_size} cannot be halved {levels} times by unet.block_out_channels")
        for section, divisor in (("autoencoder", "norm_num_groups"), ("unet", "norm_num_groups"), ("unet", "num_heads")):
            values = getattr(self, section)
            for channels in values.block_out_channels:
                if channels % getattr(values, divisor):
                    raise ValueError(
                        f"{section}.block_out_channels has {channels}, not a multiple of {divisor} {getattr(values, divisor)}"
                    )
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> "Settings":
        if not self.train_unet.images:
            raise ValueError("train_unet.images is 0; a U-Net is trained for some images")
        weighed = (self.train_vae.beta_warmup_images, self.train_vae.free_bits) != (0, 0) or self.train_vae.beta != 1
        if self.autoencoder.regulariser == "vq" and weighed:
            raise ValueError("train_vae.beta is 1, beta_warmup_images and free_bits 0 with regulariser vq: it has no KL term")
        if not self.train_vae.images and not self.autoencoder.pretrained:
            raise ValueError("train_vae.images is 0: then autoencoder.pretrained names the autoencoder that is used as it is")
        return self

    @model_validator(mode="after")
    def _samples_are_of_a_posterior(self) -> "Settings":
        vae, kind = self.train_vae, self.autoencoder.regulariser
        if self.autoencoder.optimizer == "sgld":
            if (kind, vae.objective) != ("kl", "elbo"):
                raise ValueError(
                    "optimizer sgld samples a posterior: set autoencoder.regulariser kl and train_vae.objective elbo"
                )
            if (vae.beta, vae.beta_warmup_images, vae.free_bits) != (1, 0, 0):
                raise ValueError("optimizer sgld samples a posterior: set train_vae.beta 1, beta_warmup_images and free_bits 0")
            if vae.weight_decay:
                raise ValueError("train_vae.weight_decay is 0 with optimizer sgld, whose prior is train_vae.sgld.prior_precision")
        if self.sample_posterior and kind == "vq":
            raise ValueError("sample_posterior needs autoencoder.regulariser kl; leave the list empty with vq")
        if len(set(self.sample_posterior)) < len(self.sample_posterior):
            raise ValueError(f"sample_posterior is {list(self.sample_posterior)}; name a sampler once")
        return self


def find_root(start: Path | None = None) -> Path:
    """The project folder at or above `start` (default: here), known by its `dvc.yaml` and `params.yaml`."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return folder
    raise InputError(f"{start}: no dvc.yaml and params.yaml here or above; change to the project's folder")


def load_settings(root: Path) -> Settings:
    """Read and validate `root/params.yaml`; every problem is an `InputError` that names the key."""
    path = root / "params.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run this in the project's folder") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, found {type(values).__name__}")
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {explained(error)}") from None
    encoder = settings.text.encoder  # checked now: the stage that loads it comes after the autoencoder's training
    if encoder != "minilm" and "@" not in encoder and not (root / encoder).is_dir():
        raise InputError(f"{path}: text.encoder: found {encoder!r}, neither minilm, nor a folder, nor ID@COMMIT on the hub")
    perceptual = settings.train_vae.ldm.perceptual
    if perceptual != "random" and not (root / perceptual).is_file():
        raise InputError(f"{path}: train_vae.ldm.perceptual: found {perceptual!r}, neither random nor a file")
    pretrained = settings.autoencoder.pretrained
    known = not pretrained or pretrained.startswith("models:/") or re.fullmatch(HUB, pretrained)
    if not known and not (root / str(pretrained)).is_dir():
        choices = "neither a folder, nor ID@COMMIT on the hub (40 hex digits), nor models:/NAME/VERSION"
        raise InputError(f"{path}: autoencoder.pretrained: found {pretrained!r}, {choices}")
    return settings


def value_at(values: Any, key: str, *default: Any) -> Any:
    """The value of a dotted key in nested dictionaries; `KeyError` where there is none and no default."""
    for part in key.split("."):
        if not (isinstance(values, dict) and part in values):
            if default:
                return default[0]
            raise KeyError(key)
        values = values[part]
    return values


def explained(error: ValidationError, *within: str) -> str:
    """What is wrong with each key, the section that was validated being `within`."""
    return "; ".join(_explain(problem, [*within, *map(str, problem["loc"])]) for problem in error.errors())


def _explain(problem: Any, location: list[str]) -> str:
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _keys_beside(location)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {'.'.join([*location[:-1], close[0]])}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    if problem["type"] == "missing":
        return f"missing key {key}"
    if problem["type"] == "value_error":  # our own validators name the keys in their message
        return ": ".join(filter(None, (key, str(problem["ctx"]["error"]))))
    return f"{key}: found {problem['input']!r}; {problem['msg']}"


def _keys_beside(location: list[str]) -> list[str]:
    section: type[BaseModel] = Settings
    for name in location[:-1]:
        annotation = section.model_fields[name].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    return list(section.model_fields)
