"""The sections `train_vae` and `train_unet` of the settings."""

from typing import Annotated, Literal

from ldm.base.options import Count, Fraction, OneOf, Positive, Rate, Section, Weights
from ldm.bayes.likelihoods.family import Family
from ldm.training.objectives import VaeChoice
from ldm.training.optimizers import Minimiser, Optimizer
from ldm.training.weighting import LossWeight


class Training(Section):  # linear warm-up and cosine decay, all counted in images
    images: Count  # images seen in training
    batch_size: Positive
    lr: Rate
    warmup_images: Count
    ema_halflife_images: Count  # 0 switches the average off
    checkpoint_images: Positive  # images between checkpoints (and metric deliveries)
    optimizer: Annotated[Optimizer, OneOf()]


class TrainVae(Training):
    objective: Annotated[VaeChoice, OneOf()]
    likelihood: Annotated[Family, OneOf()]
    flip: bool  # half of the images are mirrored, at random
    shuffle: Literal["global", "shard"]  # "shard" reads shard by shard, for shards that do not fit on this disk


class TrainUnet(Training):
    init: Weights | None  # the model whose U-Net training starts from: a registered version or a folder; null: from nothing
    images: Positive
    optimizer: Annotated[Minimiser, OneOf()]
    caption_dropout: Fraction  # share of captions replaced by the empty one, for classifier-free guidance
    loss_weight: Annotated[LossWeight, OneOf()]  # of noise levels
