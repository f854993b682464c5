"""The sections `diffusion` and `sampling` of the settings, and what a trained model keeps of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ldm.base.errors import InputError
from ldm.base.options import NonNegative, OneOf, Positive, Section, chosen, explained
from ldm.diffusion.noise import Noise
from ldm.diffusion.samplers.sampler import Sampler
from ldm.nets.text.encoder import Text


class Diffusion(Section):
    prediction: Literal["eps", "x0", "v", "edm", "flow"]  # what the network predicts; see `ldm.diffusion.denoiser`
    noise: Annotated[Noise, OneOf()]  # levels of training

    @model_validator(mode="after")
    def _eps_sees_the_image(self) -> "Diffusion":
        if self.prediction == "eps" and getattr(self.noise, "zero_terminal_snr", False):
            raise ValueError("zero_terminal_snr: prediction eps has nothing to learn from noise alone; take another prediction")
        return self


class Sampling(Section):
    """Defaults of the registered model, which calls may change."""

    sampler: Annotated[Sampler, OneOf()]
    schedule: Literal["karras", "exponential", "uniform"]  # how the noise levels of the steps are spaced
    steps: Positive
    guidance: NonNegative  # 1 is none
    guidance_interval: tuple[NonNegative, NonNegative] | None  # the noise levels with guidance; null: all
    guidance_rescale: Annotated[float, Field(ge=0, le=1)]  # how far guided estimates get back the deviation of unguided ones

    @model_validator(mode="after")
    def _interval_ascends(self) -> "Sampling":
        if self.guidance_interval and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval is {list(self.guidance_interval)}; give the lower noise level first, or null")
        return self


def changed_sampling(defaults: dict[str, Any], changes: dict[str, Any]) -> Sampling:
    """Sampling defaults with changes. A sampler's kind alone keeps its options. Raises `InputError`."""
    values = {**defaults, **changes}
    if isinstance(kind := values["sampler"], str):
        values["sampler"] = defaults["sampler"] if kind == defaults["sampler"]["kind"] else {"kind": kind}
    try:
        return Sampling.model_validate(values)
    except ValidationError as error:
        raise InputError(explained(error)) from None


@dataclass(frozen=True)
class Recipe:
    """What a trained model needs besides its weights: `model.json` of a saved model."""

    diffusion: dict[str, Any]  # of `Diffusion`
    autoencoder: str  # hash of the autoencoder whose latents the network was trained on
    preprocessing: dict[str, Any]  # `ldm.data.images.Preprocessing`
    latent_mean: list[float]  # mean and standard deviation of each channel, which standardise the latents
    latent_std: list[float]
    text: dict[str, Any]  # `options` of the text encoder, and `sha256` of its files
    sampling: dict[str, Any]  # defaults, of `Sampling`

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Recipe":
        """The values of a `model.json`. The first format had the options of all choices side by side, not all in every file."""
        if "diffusion" in values:
            return cls(**values)
        noise = {"kind": values["noise"], "sigma_max": values["sigma_max"]}
        for name, default in (("shift", 1.0), ("zero_terminal_snr", False)):  # not every distribution has these
            if values.get(name, default) != default:
                noise[name] = values[name]
        encoder, max_tokens, sha256 = (values["text"][name] for name in ("encoder", "max_tokens", "sha256"))
        text = {"kind": "minilm"} if encoder == "minilm" else {"kind": "transformers", "model": encoder}
        flat = {"schedule": "karras", "guidance_interval": None, "guidance_rescale": 0.0} | values["sampling"]
        kind, eta, churn = flat.pop("sampler"), flat.pop("eta", 0.0), flat.pop("churn", 0.0)
        sampler = {"kind": kind, **{"ddim": {"eta": eta}, "heun": {"churn": churn}}.get(kind, {})}
        return cls(
            diffusion={"prediction": values["kind"], "noise": noise},
            text={"options": {**text, "max_tokens": max_tokens}, "sha256": sha256},
            sampling={"sampler": sampler, **flat},
            **{name: values[name] for name in ("autoencoder", "preprocessing", "latent_mean", "latent_std")},
        )


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a saved model; `InputError` if the folder is none, or is of another version of this package."""
    try:
        recipe = Recipe.read(json.loads((folder / "model.json").read_text()))
        for section, values in ((Diffusion, recipe.diffusion), (Sampling, recipe.sampling)):
            section.model_validate(values)
        chosen(Text, recipe.text["options"])
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder}: holds no model.json; give a folder that LatentDiffusion.save wrote") from None
    except (KeyError, TypeError, ValueError) as error:
        reason = explained(error) if isinstance(error, ValidationError) else error
        raise InputError(f"{folder / 'model.json'}: not a model of this version: {reason}") from None
    return recipe


def check_guided(recipe: Recipe, options: Sampling, negative: str, guide: Recipe | None) -> None:
    """Raise an `InputError` if guidance cannot lead away from this negative prompt, or from this weaker model."""
    if options.guidance == 1 and (negative or guide):
        raise InputError("guidance 1 leads nowhere: with a negative prompt or a guiding model, set another value")
    if guide and negative:
        raise InputError("guidance leads away from a negative prompt or from a weaker model; give one of the two")
    if guide:
        ours, theirs = ((r.autoencoder, r.latent_mean, r.latent_std) for r in (recipe, guide))
        if ours != theirs:
            raise InputError("the guiding model was trained on other latents; take one of the same autoencoder and data")
