"""The sections `diffusion` and `sampling` of the settings."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ldm.base.errors import InputError
from ldm.base.options import NonNegative, OneOf, Positive, Section, explained
from ldm.diffusion.noise import Noise
from ldm.diffusion.samplers.sampler import Sampler


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
    """A model's sampling defaults with some of them changed; None changes nothing. `InputError` if a value is not valid.

    `sampler` is a dictionary with options, or a kind alone, which keeps the model's options if it is the model's sampler.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if isinstance(kind := given.get("sampler"), str):
        given["sampler"] = defaults["sampler"] if kind == defaults["sampler"]["kind"] else {"kind": kind}
    try:
        return Sampling.model_validate({**defaults, **given})
    except ValidationError as error:
        raise InputError(explained(error, "sampling")) from None
