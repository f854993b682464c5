"""What keeps the autoencoder's latents in shape: a KL term, or a codebook."""

from typing import TYPE_CHECKING, Any, Literal

from ldm.base.options import Choice, Count, NonNegative, Positive

if TYPE_CHECKING:
    from ldm.nets.autoencoder import Autoencoder


class Regulariser(Choice):
    def build(self, **config: Any) -> "Autoencoder":
        """The untrained autoencoder; `config`: constructor arguments of `Autoencoder`."""
        raise NotImplementedError


class Kl(Regulariser):
    """KL(q(z | x) ‖ N(0, I)), weighted (Rombach et al. 2022, section 3.1). By default the objective is the ELBO."""

    kind: Literal["kl"] = "kl"
    beta: NonNegative = 1.0  # weight in the objective (Higgins et al. 2017); reported ELBOs have beta = 1
    beta_warmup_images: Count = 0  # images over which beta rises from 0 (Bowman et al. 2016)
    free_bits: NonNegative = 0.0  # nats that a latent channel of an image costs at least (Kingma et al. 2016)

    def build(self, **config: Any) -> "Autoencoder":
        from ldm.nets.autoencoder import AutoencoderKL

        return AutoencoderKL(**config)


class Vq(Regulariser):
    """The nearest of `num_vq_embeddings` learned codes (van den Oord et al. 2017)."""

    kind: Literal["vq"] = "vq"
    num_vq_embeddings: Positive = 512

    def build(self, **config: Any) -> "Autoencoder":
        from ldm.nets.autoencoder import VQModel

        return VQModel(**config, num_vq_embeddings=self.num_vq_embeddings)
