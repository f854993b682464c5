"""The networks: autoencoder, U-Net and text encoder."""

from ldm._lazy import exports

__getattr__, __all__ = exports(__name__, {"AutoencoderKL": "autoencoder", "TextEncoder": "text", "UNet": "unet"})
