"""The networks: autoencoders, U-Net and text encoder."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(
    __name__,
    {
        "AutoencoderKL": "autoencoder", "VQModel": "autoencoder", "load_autoencoder": "autoencoder",
        "TextEncoder": "text.encoder", "UNet": "unet", "UnconditionalUNet": "unet",
    },
)  # fmt: skip
