"""What a trained model needs besides its weights."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What a model needs besides its weights: `model.json` of a saved model."""

    diffusion: dict[str, Any]  # `ldm.diffusion.options.Diffusion`
    autoencoder: str  # hash of the autoencoder whose latents the network was trained on
    preprocessing: dict[str, Any]  # `ldm.data.images.Preprocessing`
    latent_mean: list[float]  # of each channel; mean and deviation standardise the latents
    latent_std: list[float]
    text: dict[str, Any]  # `options` of the text encoder, and `sha256` of its files
    sampling: dict[str, Any]  # defaults, `ldm.diffusion.options.Sampling`

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Recipe":
        """The values of a `model.json`, of today's format or of the first."""
        return cls(**(values if "diffusion" in values else _from_flat(values)))


def _from_flat(values: dict[str, Any]) -> dict[str, Any]:
    """Today's form of the first `model.json`, which had the options of all choices side by side and not all of them at first."""
    kept = {name: values[name] for name in ("autoencoder", "preprocessing", "latent_mean", "latent_std")}
    later = {"shift": 1.0, "zero_terminal_snr": False}  # not every distribution of noise levels has these
    noise = {"kind": values["noise"], "sigma_max": values["sigma_max"]}
    noise |= {name: values[name] for name, default in later.items() if values.get(name, default) != default}
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
