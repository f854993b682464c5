"""`params.yaml` as frozen, validated settings. Everything here changes results; what does not is environment."""

import io
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ldm.base.errors import InputError
from ldm.base.files import write_text
from ldm.base.options import Count, Fraction, OneOf, Positive, Rate, Section, Weights, assigned, explained, value_at
from ldm.base.project import find_root as find_root
from ldm.data.conventions import Convention
from ldm.data.shapes import Shapes, Square
from ldm.data.sources.source import Source
from ldm.diffusion.options import Diffusion, Sampling
from ldm.evaluation.features import LARGEST_SIDE
from ldm.evaluation.metrics.metric import Metric
from ldm.nets.backbone import Backbone
from ldm.nets.regulariser import Kl, Regulariser
from ldm.nets.text.encoder import Text
from ldm.training.objectives import ElboChoice
from ldm.training.optimizers import Sgld
from ldm.training.options import TrainUnet, TrainVae

HUB = r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}(/.+)?"  # ID@COMMIT[/SUBFOLDER]; a branch would not say which weights
Levels = Annotated[tuple[Positive, ...], Field(min_length=1)]  # channels of each level


class Data(Section):
    source: Annotated[Source, OneOf()]  # what the `source` stage writes to data/raw/source
    path: Annotated[str, Field(min_length=1)]  # folder of images with captions, relative to the project root or absolute
    captions: Convention = "auto"  # where captions come from
    image_size: Positive  # pixels, the side of the square that models see, or of one with the area of the other shapes
    shapes: Annotated[Shapes, OneOf()] = Square()  # of images that models see
    margin: Count  # pixels stored beyond the shape, for the autoencoder's random crops
    channels: Literal[1, 3]  # greyscale or RGB
    fit: Literal["cover", "contain", "stretch"]  # how an image gets its shape
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


class Autoencoder(Section):
    """Mostly constructor arguments of `ldm.nets.AutoencoderKL`; each channel entry after the first halves the resolution."""

    pretrained: Weights | None  # a folder in diffusers' format, ID@COMMIT[/SUBFOLDER] on the hub, or a registered version
    regulariser: Annotated[Regulariser, OneOf()]  # of the latents
    latent_channels: Positive
    block_out_channels: Levels
    layers_per_block: Positive
    norm_num_groups: Positive
    attention: tuple[Annotated[int, Field(ge=0, strict=True)], ...]  # levels, 0 the finest, with attention after each resnet
    mid_block_add_attention: bool

    @property
    def factor(self) -> int:
        """Pixels per latent, on a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @model_validator(mode="after")
    def _levels_exist(self) -> "Autoencoder":
        channels, groups = list(self.block_out_channels), self.norm_num_groups
        if set(self.attention) - set(range(len(channels))) or len(set(self.attention)) < len(self.attention):
            known = f"0 to {len(channels) - 1} in block_out_channels"
            raise ValueError(f"attention is {list(self.attention)}; name levels once each, of {known}")
        if any(count % groups for count in channels):
            raise ValueError(f"block_out_channels {channels} are not all multiples of norm_num_groups {groups}")
        return self


class CacheLatents(Section):
    flip: bool  # training images are encoded a second time, mirrored
    shorten: bool  # the start of a long caption is a further caption of its image
    shuffle_tags: Annotated[int, Field(ge=0, le=100, strict=True)]  # further captions of each list of tags: so many other orders


class Evaluate(Section):
    test_images: Annotated[int, Field(ge=2)]  # measured at most, those with the smallest hashes of their files
    samples: Annotated[int, Field(ge=2)]  # images drawn for the captions of the data
    unseen_samples: Positive  # images drawn for the prompts of prompts.csv
    bound_levels: Positive  # noise levels a test image, for the diffusion term of the bound
    importance_samples: Positive  # posterior samples a test image, for the autoencoder's importance-weighted bound
    metrics: tuple[Annotated[Metric, OneOf()], ...]  # beside the bound

    @model_validator(mode="after")
    def _names_differ(self) -> "Evaluate":
        names = [getattr(metric, "name", metric.kind) for metric in self.metrics]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"metrics: two are called {repeated[0]}; give one of them another name, or remove it")
        return self


class Posterior(Section):
    """How the stages `sample_posterior` sample weights of the decoder."""

    part: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None  # modules; null: the last block
    lr: Rate | None  # step size; null: measured, see `ldm.langevin.step_size`
    prior_precision: Annotated[float, Field(ge=0)]  # of a Gaussian prior of the weights; 0 is flat
    temperature: Rate  # 1 is the posterior; step sizes are measured against its noise
    friction: Annotated[float, Field(gt=0, le=1)]  # of sghmc
    chains: Annotated[int, Field(ge=2)]
    batch_size: Positive  # images of a step of a chain
    burn_in: Count  # steps before the first draw
    thin: Positive  # steps from one draw to the next
    draws: Annotated[int, Field(ge=4)]  # of each chain


class Registry(Section):
    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]  # MLflow refuses . and ..
    level: Annotated[float, Field(gt=0, lt=0.5)]  # chance of promoting an equal model; see ldm/evaluation/gate.py


class Settings(Section):
    seed: Count
    deterministic: bool
    precision: Literal["auto", "fp32", "bf16"]  # of training; auto is bf16 on a GPU that has it, else fp32
    compile: bool  # training through torch.compile
    data: Data
    text: Annotated[Text, OneOf()]
    autoencoder: Autoencoder
    train_vae: TrainVae
    cache_latents: CacheLatents
    backbone: Annotated[Backbone, OneOf()]
    diffusion: Diffusion
    train_unet: TrainUnet
    sampling: Sampling
    evaluate: Evaluate
    sample_posterior: tuple[Literal["sgld", "sghmc"], ...]  # samplers; each is a stage
    posterior: Posterior
    registry: Registry

    @model_validator(mode="after")
    def _networks_take_every_shape(self) -> "Settings":
        size, factor = self.data.image_size, self.autoencoder.factor
        if size % factor:
            raise ValueError(f"data.image_size {size} is not a multiple of the autoencoder's factor {factor}")
        self.backbone.check(size // factor)
        for side in sorted({side for shape in self.data.shapes.shapes(size) for side in shape}):
            found = f"data.shapes has images of side {side}"
            if side % factor:
                advice = f"set data.shapes.step to a multiple of {factor}"
                raise ValueError(f"{found}, no multiple of the autoencoder's factor {factor}; {advice}")
            try:
                self.backbone.check(side // factor)
            except ValueError as error:
                raise ValueError(f"{found}, but {error}; set data.shapes.step to a larger divisor of data.image_size") from None
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> "Settings":
        shapes = self.data.shapes.shapes(self.data.image_size)
        values = self.data.channels * min(LARGEST_SIDE, *(min(shape) for shape in shapes)) ** 2  # of an image, as features see it
        for number, metric in enumerate(self.evaluate.metrics):
            try:
                metric.check_settings(self.evaluate.samples, values)
            except ValueError as error:
                raise ValueError(f"evaluate.metrics.{number}: {error}") from None
        vae, regulariser = self.train_vae, self.autoencoder.regulariser
        if not vae.images and not self.autoencoder.pretrained:
            raise ValueError("train_vae.images is 0: then autoencoder.pretrained names the autoencoder that is used as it is")
        bound = isinstance(vae.objective, ElboChoice) and regulariser == Kl()
        if isinstance(vae.optimizer, Sgld) and not bound:
            raise ValueError("optimizer sgld needs objective elbo, and regulariser kl: beta 1, beta_warmup_images 0, free_bits 0")
        if self.sample_posterior and not isinstance(regulariser, Kl):
            raise ValueError("sample_posterior needs autoencoder.regulariser kl; leave the list empty with another one")
        if self.sample_posterior and len(shapes) > 1:
            raise ValueError("sample_posterior needs images of one shape; leave the list empty, or set data.shapes: square")
        if len(set(self.sample_posterior)) < len(self.sample_posterior):
            raise ValueError(f"sample_posterior is {list(self.sample_posterior)}; name a sampler once")
        return self


def load_settings(root: Path) -> Settings:
    """Read and validate `root/params.yaml`; every problem is an `InputError` that names the key."""
    path = root / "params.yaml"
    try:
        return validated(_values(path.read_text(encoding="utf-8"), path), root)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run this in the project's folder") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; make it readable") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not readable as YAML: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _values(text: str, path: Path) -> Any:
    """YAML as DVC reads it, which is YAML 1.2: 010 is ten, and a key twice is an error."""
    try:
        return YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        line, problem = (error.problem_mark.line + 1 if error.problem_mark else 1), " ".join(str(error.problem).split())
        if twice := re.match('found duplicate key "(.*?)" ', problem):
            raise InputError(f"{path}: line {line}: the key {twice[1]} is there a second time; keep one of the two") from None
        raise InputError(f"{path}: line {line}: not readable as YAML: {problem}; mend that line or the one before") from None
    except YAMLError as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None


def change_settings(root: Path, assignments: list[str]) -> list[str]:
    """Write values into `root/params.yaml`, comments kept; returns what changed, a line each. `InputError` if not valid then."""
    path, document, changed_text = (root / "params.yaml").resolve(), YAML(), io.StringIO()  # resolved: a link stays one
    document.preserve_quotes, document.width, document.default_flow_style = True, 1000, None  # new lists in one line
    document.indent(mapping=2, sequence=4, offset=2)
    document.representer.add_representer(type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null"))
    text = path.read_text(encoding="utf-8")
    before = _values(text, path)
    document.dump(assigned(document.load(text), assignments), changed_text)
    after = _values(changed_text.getvalue(), path)
    validated(after, root)
    write_text(path, changed_text.getvalue())
    names = dict.fromkeys(assignment.partition("=")[0].removesuffix(".kind") for assignment in assignments)
    in_yaml: Any = partial(yaml.safe_dump, default_flow_style=True, sort_keys=False, width=1000)
    changes = ((name, [in_yaml([value_at(found, name, None)])[1:-2] for found in (before, after)]) for name in names)
    changed = {name: f"{name}: {old}, now {new}" for name, (old, new) in changes if old != new}
    return [line for name, line in changed.items() if not any(name.startswith(f"{other}.") for other in changed)]


def validated(values: Any, root: Path) -> Settings:
    """The settings of these values, and a look at the files that they name: before anything is trained."""
    try:
        if not isinstance(values, dict):
            raise ValueError(f"expected keys and values, found {type(values).__name__}")
        settings = Settings.model_validate(values)
        settings.text.check(root)
        settings.train_vae.objective.check(root, settings.train_vae.likelihood)
        name, init = settings.autoencoder.pretrained, settings.train_unet.init
        if not (name is None or name.startswith("models:/") or re.fullmatch(HUB, name) or (root / name).is_dir()):
            choices = "neither a folder, nor ID@COMMIT on the hub (40 hex digits), nor models:/NAME/VERSION"
            raise ValueError(f"autoencoder.pretrained: found {name!r}, {choices}")
        if not (init is None or init.startswith("models:/") or (root / init / "model.json").is_file()):
            raise ValueError(f"train_unet.init: found {init!r}, neither models:/NAME/VERSION nor a folder of a saved model")
    except ValueError as error:
        problem = explained(error) if isinstance(error, ValidationError) else error
        raise InputError(f"{root / 'params.yaml'}: {problem}") from None
    return settings
