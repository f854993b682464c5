"""What the autoencoder's latents carry, channel by channel."""

from typing import Literal

from ldm.evaluation.metrics.metric import Evaluation, Metric
from ldm.evaluation.value import Value

READINGS = {  # of the names of `ldm.bayes.diagnostics.Diagnostics.metrics`: unit, title, how to read it
    "active_units": ("", "active units", "Latent units whose posterior mean varies between images by more than 0.01."),
    "active_units_fraction": ("share", "active units, share", "The same as a share of all latent units."),
    "collapsed_channels": ("", "collapsed channels", "Channels that carry nearly nothing; 0 is best."),
    "mutual_information_nats": ("nats", "information in latents", "I(x; z) per image, an estimate that its ceiling limits."),
    "mutual_information_ceiling_nats": ("nats", "… its ceiling", "The most that this estimate can be."),
    "value_information_ceiling_nats": ("nats", "information in a value, ceiling", "The most that these estimates can be."),
    "kl_nats": ("nats", "KL", "KL(q(z | x) ‖ p(z)) per image."),
    "latent_mean": ("", "mean", "Mean of the aggregate posterior; the prior's is 0."),
    "latent_std": ("", "deviation", "Standard deviation of the aggregate posterior; the prior's is 1."),
    "aggregate_kl_nats": ("nats", "aggregate KL", "KL of one latent value's aggregate posterior from the prior; 0 is best."),
    "value_information_nats": ("nats", "information in a value", "I(image and position; z) of one latent value."),
}


class Latents(Metric):
    """Active units, information, and the KL term taken apart; see `ldm/bayes/README.md`. Not for VQ, whose latents are codes."""

    kind: Literal["latents"] = "latents"

    def measure(self, evaluation: Evaluation) -> list[Value]:
        values = []
        for name, value in evaluation.latents.metrics().items() if evaluation.latents else ():
            about, _, channel = name.partition("_channel_")
            unit, title, reading = READINGS[about]
            title = f"channel {channel}: {title}" if channel else title
            values.append(Value(name=name, value=value, unit=unit, title=title, reading=reading))
        return values
