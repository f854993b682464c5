"""The networks: autoencoders, U-Net and text encoder."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(
    __name__, {"autoencoder": "AutoencoderKL VQModel load_autoencoder", "text.encoder": "TextEncoder", "unet": "UNet"}
)
