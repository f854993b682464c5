"""The posterior of weights of the decoder, given the training images and one draw of latents from q(z | x) for each."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.memory import Parts
from ldm.base.pixels import to_float
from ldm.base.progress import Progress
from ldm.base.randomness import generator, seed_for
from ldm.bayes.likelihoods.likelihood import Likelihood
from ldm.langevin.chains import Chains, Draws, control_variates
from ldm.langevin.sgld import SAMPLERS
from ldm.langevin.step_size import StepSize, find_step_size
from ldm.nets.autoencoder import Autoencoder, Decoder

CHECKPOINT_STEPS = 50
MINIBATCHES = 16  # whose gradients' variance limits the step size
GROWTH = 2.0  # by which gradient noise may still grow after the burn-in, when the step size is set

Images = Callable[[list[int]], Any]  # from numbers of images to uint8 (N, C, H, W), numpy or torch
Part = tuple[str, ...] | None  # names of modules of the decoder; None: its last block and all that follows it
Checkpoint = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and JSON
Stoppable = Callable[[], AbstractContextManager[Callable[[], bool]]]  # yields a function: whether a stop was asked for


class DecoderLoss:
    """The mean -log p(x | z, θ) of minibatches of images in nats, a function of the weights θ of a part of the decoder."""

    def __init__(self, autoencoder: Autoencoder, likelihood: Likelihood, images: Images, count: int, part: Part, seed: int):
        """`images` are `count` training images; the parameters of both networks must not require gradients."""
        # GroupNorm's backward in channels-last crashes (torch 2.13) unless all its gradients are asked for. Weights are cloned,
        # because `to` keeps the strides of dimensions of size 1, from which convolutions infer the memory format.
        for weight in autoencoder.parameters():
            weight.data = weight.detach().clone(memory_format=torch.contiguous_format)
        self.autoencoder, self.likelihood, self.images, self.count, self.seed = autoencoder, likelihood, images, count, seed
        self.device, self.start = likelihood.log_scale.device, part_of(autoencoder.decoder, part)

    def __call__(self, weights: dict[str, Tensor], h: Tensor, x: Tensor) -> Tensor:
        output = torch.func.functional_call(self.autoencoder.decoder, weights, (h,))
        return -self.likelihood.log_prob(x, output).flatten(1).sum(1).mean()

    @torch.no_grad()
    def data(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """The decoder's inputs and the images (N, C, H, W) it is to reconstruct; an image always has the same latents."""
        x = to_float(self.images(numbers)).to(self.device)
        posterior = self.autoencoder.encode(x)
        rngs = [generator(self.seed, "posterior latents", number) for number in numbers]
        noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=rng) for rng in rngs])
        h = self.autoencoder.post_quant_conv(posterior.sample(noise.to(self.device)))
        return h.clone(memory_format=torch.contiguous_format), x

    def minibatches(self, purpose: str, step: int, chains: int, size: int) -> tuple[Tensor, Tensor]:
        """For each chain `data` of images drawn with replacement, (chains, size, …) each."""
        drawn = torch.randint(self.count, (chains, size), generator=generator(self.seed, purpose, step))
        h, x = zip(*(self.data(numbers) for numbers in drawn.tolist()), strict=True)
        return torch.stack(h), torch.stack(x)


def part_of(decoder: Decoder, part: Part) -> dict[str, Tensor]:
    """The weights of a part of the decoder, by name."""
    names = part or (f"up_blocks.{len(decoder.up_blocks) - 1}", "conv_norm_out", "conv_out")
    modules = {name for name, _ in decoder.named_modules() if name}
    for name in sorted(set(names) - modules):
        known = ", ".join(sorted(module for module in modules if module.count(".") < 2))
        raise InputError(f"posterior.part: the decoder has no {name!r}; it has {known}, and their submodules")
    prefixes = tuple(f"{name}." for name in names)
    if not (weights := {key: value.detach() for key, value in decoder.named_parameters() if key.startswith(prefixes)}):
        raise InputError(f"posterior.part: {', '.join(names)} of the decoder holds no weights; name a part that does")
    return weights


class DecoderChains(Chains):
    """Chains of "sgld" or "sghmc" under control variates, with the keys of `posterior` in params.yaml; `lr` None: measured."""

    lr: float
    at_start: StepSize | None = None

    def __init__(
        self, loss: DecoderLoss, sampler: str, *, lr: float | None, friction: float, prior_precision: float, temperature: float,
        chains: int, batch_size: int, burn_in: int, thin: int, draws: int,
    ) -> None:  # fmt: skip
        self.label, self.steps, self.adapts = f"sample_posterior: {sampler}", burn_in + thin * draws, lr is None
        options: dict[str, Any] = {"num_data": loss.count, "prior_precision": prior_precision, "temperature": temperature}
        options |= {"friction": friction} if sampler == "sghmc" else {}
        data = (loss.data(part.tolist()) for part in torch.arange(loss.count).split(batch_size))
        with Progress(f"{self.label}: the gradient of all {loss.count:,} images"):
            corrected = control_variates(loss, loss.start, data)
        start = {name: value.expand(chains, *value.shape) for name, value in loss.start.items()}
        make = partial(SAMPLERS[sampler], lr=lambda step: self.lr, seed=seed_for(loss.seed, "posterior", sampler), **options)
        on_gpu = loss.device.type != "cpu"  # vmap makes grouped convolutions, which are slow on a CPU
        super().__init__(corrected, start, make, burn_in=burn_in, thin=thin, vectorized=on_gpu)
        self.minibatch = partial(loss.minibatches, "posterior", chains=chains, size=batch_size)
        self.measured_on = [loss.minibatches("step size", i, 1, batch_size) for i in range(MINIBATCHES)]
        self.find: Callable[..., StepSize] = partial(find_step_size, minibatches=MINIBATCHES, seed=loss.seed, **options)
        self.at_start = self.limits()
        self.lr = lr or self.at_start.recommended()

    def limits(self) -> StepSize:
        """What limits the step size at the first chain's weights; of these, only gradient noise is measured after the start."""
        weights = {name: value[0].detach().clone().requires_grad_() for name, value in self.parameters.items()}
        loss = lambda i: self.loss(weights, *(tensor[0] for tensor in self.measured_on[i]))  # noqa: E731
        with Progress(f"{self.label}: the curvature"):
            return self.find(loss, list(weights.values()), nearby=self.at_start)

    def run(self, saved: Checkpoint | None, save: Callable[..., None], stoppable: Stoppable) -> None:
        """Take all steps, from a checkpoint on if there is one; if a stop was asked for, save and raise `KeyboardInterrupt`."""
        if saved:
            self.load_state_dict(saved[0], saved[1]["images_seen"])
            self.lr = saved[1]["lr"]
        while self.done < self.steps:
            label, end = (self.label, self.steps) if self.done >= self.burn_in else (f"{self.label}, burn-in", self.burn_in)
            if self.done == self.burn_in and self.adapts:
                now = self.limits()  # noisier than at the start
                noises = {name: GROWTH * getattr(now, name) for name in ("gradient_noise", "mean_gradient_noise")}
                self.lr = min(self.lr, replace(now, **noises).recommended())
            with Progress(label, end, "steps") as progress, stoppable() as should_stop:
                progress(self.done)
                while self.done < end:
                    losses = self.step(*self.minibatch(self.done))
                    if not losses.isfinite().all():
                        raise InputError(f"{label}: the chains diverged by step {self.done}; set a smaller posterior.lr, or null")
                    if (stop := should_stop()) or self.done % CHECKPOINT_STEPS == 0:
                        save(self.state_dict(), {"images_seen": self.done, "lr": self.lr})
                    if stop:
                        raise KeyboardInterrupt(f"stopped at a checkpoint after {self.done} steps")
                    progress(self.done, {"loss": float(losses.mean())})


class DecoderPosterior:
    """p(x | z) averaged over S draws of weights of the decoder, named as in `autoencoder.decoder`."""

    def __init__(self, autoencoder: Autoencoder, likelihood: Likelihood, draws: Draws) -> None:
        known = {name: tuple(value.shape) for name, value in autoencoder.decoder.named_parameters()}
        for name, shape in ((name, tuple(value.shape[2:])) for name, value in draws.values.items()):
            if known.get(name) != shape:
                raise InputError(f"posterior samples have {name} {shape}, the decoder {known.get(name, 'has not')}")
        self.autoencoder, self.likelihood, self.draws, self.device = autoencoder, likelihood, draws, likelihood.log_scale.device
        self.divide = Parts(self.device)
        self.weights = (draws.weights / draws.weights.sum() / draws.chains).repeat(draws.chains)  # (S,), sum 1

    def outputs(self, z: Tensor) -> Iterator[Tensor]:
        """The decoder's output (B, C, H, W) for latents z (B, c, h, w) under each draw."""
        h = self.autoencoder.post_quant_conv(z)
        for draw in self.draws:
            on_device = {name: value.to(z.device) for name, value in draw.items()}
            yield torch.func.functional_call(self.autoencoder.decoder, on_device, (h,))

    @torch.no_grad()
    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z, θ) of images x (B, C, H, W) in [-1, 1] for each draw θ, in nats, (S, B), float64."""
        return torch.stack([self.likelihood.log_prob(x, output).double().flatten(1).sum(1).cpu() for output in self.outputs(z)])

    def average(self, log_prob: Tensor) -> Tensor:
        """log p(x | z) of the Bayesian model average, the log of the mean of p(x | z, θ), from `log_prob` (S, B); nats (B,)."""
        return torch.logsumexp(log_prob + self.weights.log()[:, None], 0)

    def moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean and unbiased standard deviation of `values` (S, …) over the draws."""
        if len(values) < 2:
            raise InputError("a standard deviation takes 2 or more posterior samples")
        w = self.weights.to(values).view(-1, *[1] * (values.ndim - 1))
        mean = (w * values).sum(0)
        variance = (w * (values - mean).square()).sum(0) / (1 - float(self.weights.square().sum()))
        return mean, variance.sqrt()

    @torch.no_grad()
    def uncertainty(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over draws of the decoded images, each (B, C, H, W) in [-1, 1]."""
        return self.moments(torch.stack([self.likelihood.mean(output).clamp(-1, 1) for output in self.outputs(z)]))

    def scores(self, pixels: Tensor) -> Tensor:
        """How unlike the training data uint8 images (N, C, H, W) are: spread of `log_prob` at the mean of q(z | x), nats (N,)."""

        def spread(part: slice) -> Tensor:
            return self.moments(self.log_prob(*self._encoded(pixels[part])))[1]

        return torch.cat(list(self.divide(spread, len(pixels), kind="scores")))

    def reconstructions(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`uncertainty` at the mean of q(z | x) of uint8 images (N, C, H, W), on the CPU."""

        def uncertainty(part: slice) -> tuple[Tensor, ...]:
            return tuple(moment.cpu() for moment in self.uncertainty(self._encoded(pixels[part])[1]))

        mean, std = zip(*self.divide(uncertainty, len(pixels), kind="reconstructions"), strict=True)
        return torch.cat(mean), torch.cat(std)

    @torch.no_grad()
    def _encoded(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and the means of their latents, on the device."""
        x = to_float(pixels).to(self.device)
        return x, self.autoencoder.encode(x).mean
