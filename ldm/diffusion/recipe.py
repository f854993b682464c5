"""What a trained model needs besides its weights."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """`model.json` of a saved model."""

    diffusion: dict[str, Any]  # `ldm.diffusion.options.Diffusion`
    autoencoder: str  # hash of the autoencoder whose latents the network was trained on
    preprocessing: dict[str, Any]  # `ldm.data.images.Preprocessing`
    latent_mean: list[float]  # mean and standard deviation of each channel, which standardise the latents
    latent_std: list[float]
    text: dict[str, Any]  # `options` of the text encoder, and `sha256` of its files
    sampling: dict[str, Any]  # defaults, `ldm.diffusion.options.Sampling`

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
        eta, churn, sampler = flat.pop("eta", 0.0), flat.pop("churn", 0.0), {"kind": flat.pop("sampler")}
        sampler |= {"ddim": {"eta": eta}, "heun": {"churn": churn}}.get(sampler["kind"], {})
        return cls(
            diffusion={"prediction": values["kind"], "noise": noise},
            text={"options": {**text, "max_tokens": max_tokens}, "sha256": sha256},
            sampling={"sampler": sampler, **flat},
            **{name: values[name] for name in ("autoencoder", "preprocessing", "latent_mean", "latent_std")},
        )
