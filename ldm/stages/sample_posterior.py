"""Sample the posterior of weights of the trained decoder, and measure what an average over the samples is good for.

The posterior is that of the decoder's part θ given the training images and one draw of latents from q(z | x) for each, all other
weights being as trained: U(θ) = -log prior(θ) - Σ log p(x | z, θ). Chains start from the trained weights, which are also the
centre of control variates, without which a step that is small enough for the gradients' noise would get nowhere.
"""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ldm.base.device import set_up
from ldm.base.errors import InputError
from ldm.base.hashing import canonical_json, folder_hash
from ldm.base.paths import BOUNDS, MODEL, POSTERIOR, POSTERIOR_REPORTS, SHARDS
from ldm.base.pixels import BIN, to_float, to_uint8
from ldm.base.progress import Progress
from ldm.base.randomness import generator, seed_for
from ldm.config import Posterior, load_settings
from ldm.data.batches import order
from ldm.data.reader import ShardReader
from ldm.langevin import convergence
from ldm.langevin.chains import Chains, control_variates
from ldm.langevin.predictive import BATCH, DecoderPosterior
from ldm.langevin.sgld import SAMPLERS, check_deterministic
from ldm.langevin.step_size import StepSize, find_step_size
from ldm.model import LatentDiffusion
from ldm.nets.blocks import network_hash
from ldm.registry.tracking import stage_run
from ldm.report.grid import image_grid
from ldm.report.plots import histograms, traces
from ldm.stages.inputs import index_hash, stage_shards
from ldm.stages.runtime import stage_main, stop_at_checkpoint
from ldm.stages.stage import Stage
from ldm.stages.work import identify, opened
from ldm.training.checkpoint import CheckpointStore, load_optimizer_tensors, optimizer_tensors

CHECKPOINT_STEPS = 50
GROWTH = 2.0  # of the gradients' noise on the way from the burn-in's end, which the step size allows for
TRACED = 4  # held-out images whose log-likelihood is drawn against the draws
SHOWN = 8  # images in a row
TINY = 1e-12  # nats
MEASURED = 1024  # test images at most whose pixels are mapped and scores kept

Metrics = dict[str, Any]


class Decoding:
    """The decoder as a likelihood: the mean -log p(x | z, θ) of a minibatch, in nats an image."""

    def __init__(self, model: LatentDiffusion, train: ShardReader, part: tuple[str, ...] | None, seed: int) -> None:
        # GroupNorm's backward in channels-last crashes (torch 2.13) where it is not asked for every gradient. Copies, because
        # `to` leaves the strides of dimensions of size 1, by which convolutions go.
        for weight in model.autoencoder.parameters():
            weight.data = weight.detach().clone(memory_format=torch.contiguous_format)
        check_deterministic(model.autoencoder)
        self.model, self.train, self.seed = model, train, seed
        self.start = chosen(model.autoencoder.decoder, part)

    def loss(self, weights: dict[str, Tensor], h: Tensor, x: Tensor) -> Tensor:
        output = torch.func.functional_call(self.model.autoencoder.decoder, weights, (h,))
        return -self.model.likelihood.log_prob(x, output).flatten(1).sum(1).mean()

    def data(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """What the decoder gets and has to give back for training images, of whose latents each has one draw for good."""
        x = to_float(self.train.images(numbers)).to(self.model.device)
        rngs = [generator(self.seed, "posterior latents", number) for number in numbers]
        with torch.no_grad():
            z = self.model.autoencoder.encode(x).sample(self.model.latent_noise(rngs))
            h = self.model.autoencoder.post_quant_conv(z)
        return h.clone(memory_format=torch.contiguous_format), x

    def batches(self, size: int, purpose: str, step: int, chains: int) -> tuple[Tensor, Tensor]:
        """Minibatches of images drawn with replacement, one for each chain: (chains, size, …) each."""
        drawn = torch.randint(len(self.train), (chains, size), generator=generator(self.seed, purpose, step))
        parts = [self.data(numbers) for numbers in drawn.tolist()]
        return torch.stack([h for h, _ in parts]), torch.stack([x for _, x in parts])


def chosen(decoder: torch.nn.Module, part: tuple[str, ...] | None) -> dict[str, Tensor]:
    """The weights by name of modules of the decoder; by default of its last block and all that follows."""
    modules = [name for name, _ in decoder.named_modules() if name]
    last = max(name for name in modules if name.startswith("up_blocks.") and name.count(".") == 1)
    names = part or (last, "conv_norm_out", "conv_out")
    for name in names:
        if name not in modules:
            known = sorted({module for module in modules if module.count(".") < 2})
            raise InputError(f"posterior.part: the decoder has no {name!r}; it has {', '.join(known)}, and what is in them")
    starts = tuple(f"{name}." for name in names)
    weights = {key: value.detach() for key, value in decoder.named_parameters() if key.startswith(starts)}
    if not weights:
        raise InputError(f"posterior.part: {', '.join(names)} of the decoder holds no weights; name a part that does")
    return weights


def resume(chains: Chains, store: CheckpointStore) -> None:
    """Go back to the last checkpoint, if there is one."""
    if found := store.load():
        tensors, state = found
        chains.load_state_dict(tensors, state["images_seen"])
        of_optimizer = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        load_optimizer_tensors(chains.optimizer, of_optimizer)
        chains.optimizer.param_groups[0]["lr"] = state["lr"]


def sample(chains: Chains, batch: Callable[[int], tuple[Tensor, ...]], steps: int, store: CheckpointStore, name: str) -> None:
    """Take what is left of `steps`, with checkpoints on the way."""
    with Progress(name, steps, "steps") as progress, stop_at_checkpoint() as should_stop:
        progress(chains.done)
        while chains.done < steps:
            losses = chains.step(*batch(chains.done))
            if not torch.isfinite(losses).all():
                raise InputError(f"{name}: the chains diverged by step {chains.done}; set a smaller posterior.lr, or null")
            stop = should_stop()
            if stop or chains.done % CHECKPOINT_STEPS == 0:
                optimizer = {f"optimizer.{k}": v for k, v in optimizer_tensors(chains.optimizer).items()}
                store.save({**chains.state_dict(), **optimizer}, {"images_seen": chains.done, "lr": chains.optimizer.step_size()})
            if stop:
                raise KeyboardInterrupt(f"stopped at a checkpoint after {chains.done} steps")
            progress(chains.done, {"loss": float(losses.mean())})


def run(root: Path, sampler: str) -> None:
    settings = load_settings(root)
    options, seed = settings.posterior, settings.seed
    if sampler not in ("sgld", "sghmc"):
        raise InputError(f"sample_posterior {sampler}: name a sampler, sgld or sghmc")
    device = set_up(settings.deterministic)
    train, test = (stage_shards(root, split) for split in ("train", "test"))
    model = LatentDiffusion.load(root / MODEL, device)
    inputs = {"model": folder_hash(root / MODEL), "shards": index_hash(train)}
    params, steps = {"sampler": sampler, **STAGE.params(settings)}, options.burn_in + options.thin * options.draws
    identity = identify(STAGE.name, params, inputs, {"device": str(device)})
    with (
        opened(root, identity, steps, torch.get_num_threads()) as work,
        stage_run(f"{STAGE.name}_{sampler}", params, work.key, work.tags()) as tracker,
        contextlib.ExitStack() as held,
    ):
        store = CheckpointStore(work.checkpoint)
        chains, limits = draw(options, sampler, Decoding(model, train, options.part, seed), store)
        held.enter_context(Progress(f"sample_posterior: {sampler}: measuring the samples"))
        posterior = DecoderPosterior(model.autoencoder, model.likelihood, chains.draws())
        plots = root / POSTERIOR_REPORTS / sampler
        shutil.rmtree(plots, ignore_errors=True)
        plots.mkdir(parents=True)
        rows = np.sort(order(seed_for(seed, "posterior measured"), len(test), 0, min(len(test), MEASURED)))
        pixels = torch.from_numpy(test.images(rows))
        scores, more = separated(posterior, pixels, seed, plots)
        metrics: Metrics = {"sampler": sampler, "weights": sum(value.numel() for value in next(iter(posterior.draws)).values())}
        metrics |= described(limits, chains.optimizer.step_size()) | averaged(root, model, posterior, test, seed, plots) | more
        texts = test.captions.text.drop_duplicates().head(SHOWN).tolist()
        metrics |= mapped(model, posterior, pixels, texts, seed, plots)
        doubts = len(metrics["step_size_warnings"]) + len(metrics["convergence_warnings"])
        summary = f"{metrics['average_bits_per_dim']:.4f} bits/dim averaged over {metrics['draws']} samples"
        metrics["summary"] = summary + (f"; {doubts} warnings" if doubts else "")
        write(root, sampler, posterior, pd.DataFrame({"key": test.captions.key.iloc[rows], "score": scores}), metrics)
        work.note_adopted(root / POSTERIOR / sampler)
        tracker.log({name: value for name, value in metrics.items() if isinstance(value, int | float)}, 0)
        tracker.artifact(plots, "plots")
        work.finish()
    for warning in (*metrics["step_size_warnings"], *metrics["convergence_warnings"]):
        print(f"sample_posterior: warning: {warning}", flush=True)
    before, after, gain, error = (metrics[n] for n in ("bits_per_dim", "average_bits_per_dim", "gain_nats", "gain_nats_se"))
    print(f"sample_posterior: {before:.4f} bits/dim as trained, {after:.4f} averaged (by {gain:.2f} ± {error:.2f} nats an image)")


def draw(options: Posterior, sampler: str, decoding: Decoding, store: CheckpointStore) -> tuple[Chains, StepSize]:
    """The chains at their end, and what limits their step size there."""
    friction = options.friction if sampler == "sghmc" else 1.0
    parts = torch.arange(len(decoding.train)).split(options.batch_size)
    with Progress(f"sample_posterior: {sampler}: the gradient of all {len(decoding.train):,} images"):
        loss = control_variates(decoding.loss, decoding.start, (decoding.data(part.tolist()) for part in parts))
    common: dict[str, Any] = {"num_data": len(decoding.train), **options.model_dump(include={"prior_precision", "temperature"})}

    @cache  # they are the same at all weights
    def minibatch(i: int) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in decoding.batches(options.batch_size, "step size", i, 1))

    def measure(weights: dict[str, Tensor], nearby: StepSize | None = None) -> StepSize:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
        given = {**common, "friction": friction, "seed": decoding.seed, "nearby": nearby}
        with Progress(f"sample_posterior: {sampler}: the curvature"):
            return find_step_size(lambda i: loss(leaves, *minibatch(i)), list(leaves.values()), **given)

    bends = measure(decoding.start)
    lr = options.lr or bends.recommended()
    own = {"friction": friction} if sampler == "sghmc" else {}
    chains = Chains(
        loss,
        {name: value.expand(options.chains, *value.shape) for name, value in decoding.start.items()},
        partial(SAMPLERS[sampler], lr=lr, **common, **own, seed=seed_for(decoding.seed, "posterior", sampler)),
        burn_in=options.burn_in,
        thin=options.thin,
        vectorized=decoding.model.device.type != "cpu",  # there grouped convolutions are slower than one after the other
    )
    batch = partial(decoding.batches, options.batch_size, "posterior", chains=options.chains)
    steps, name = options.burn_in + options.thin * options.draws, f"sample_posterior: {sampler}"

    def limits() -> StepSize:
        """At the first chain's weights, where gradients are noisier than at the centre."""
        return measure({name: value[0] for name, value in chains.parameters.items()}, nearby=bends)

    resume(chains, store)
    if chains.done < options.burn_in:
        sample(chains, batch, options.burn_in, store, f"{name}, burn-in")
    if chains.done == options.burn_in and options.lr is None:
        now = limits()
        noisier = replace(now, gradient_noise=GROWTH * now.gradient_noise, mean_gradient_noise=GROWTH * now.mean_gradient_noise)
        chains.optimizer.param_groups[0]["lr"] = min(lr, noisier.recommended())
    sample(chains, batch, steps, store, name)
    return chains, limits()


def described(limits: StepSize, lr: float) -> Metrics:
    """What a step size does."""
    return {
        "lr": lr,
        "lr_recommended": limits.recommended(),
        "contraction": limits.contraction(lr),
        "noise_ratio": limits.noise_ratio(lr),
        "inflation": limits.inflation(lr),
        "step_size_warnings": limits.warnings(lr),
    }


def averaged(
    root: Path, model: LatentDiffusion, posterior: DecoderPosterior, test: ShardReader, seed: int, plots: Path
) -> Metrics:
    """Bits/dim of the whole system on the test images, of the trained weights and of the average, and whether chains converged.

    Of the bound's three terms only the reconstruction depends on the decoder: the others are those of the evaluation.
    """
    bounds = pd.read_csv(root / BOUNDS)
    trained, draws = [], []
    for rows in np.split(np.arange(len(test)), range(BATCH, len(test), BATCH)):
        images = torch.from_numpy(test.images(rows))
        z = model.bound_latents(images, test.captions.key.iloc[rows].tolist(), seed=seed)
        x = to_float(images).to(model.device)
        with torch.no_grad():
            trained.append(model.likelihood.log_prob(x, model.autoencoder.decode(z)).double().flatten(1).sum(1).cpu())
        draws.append(posterior.log_prob(x, z))
    single, each = torch.cat(trained).numpy(), torch.cat(draws, 1)
    if bounds.key.tolist() != test.captions.key.tolist() or not np.allclose(bounds.reconstruction, single, rtol=1e-4, atol=0.1):
        raise InputError(f"{root / 'reports/bounds.csv'}: is not of this model and these test images; run `dvc repro evaluate`")
    gain, to_bits = posterior.average(each).numpy() - single, 1 / (bounds.dims * np.log(2))
    values = each.view(posterior.draws.chains, -1, each.shape[1]).numpy()
    found = convergence.convergence(values)
    names = [f"image {key}" for key in bounds.key[:TRACED]]
    shown = values[..., : len(names)]
    traces(shown, plots / "traces.png", title="log p(x | z, θ) of held-out images", names=names, y_label="nats")
    return {
        "bits_per_dim": float((-bounds.nats * to_bits).mean()),
        "average_bits_per_dim": float((-(bounds.nats + gain) * to_bits).mean()),
        "draw_bits_per_dim": float((-(bounds.nats + each.mean(0).numpy() - single) * to_bits).mean()),
        "gain_nats": float(gain.mean()),
        "gain_nats_se": float(gain.std(ddof=1) / np.sqrt(len(gain))),
        "draws": posterior.draws.count,
        "rhat": float(found.rhat.max()),
        "ess": float(found.ess.min()),
        "convergence_warnings": convergence.warnings(found),
    }


def mapped(
    model: LatentDiffusion, posterior: DecoderPosterior, pixels: Tensor, texts: list[str], seed: int, plots: Path
) -> Metrics:
    """Maps of the uncertainty of every pixel, of reconstructions and of samples; how it goes along with squared errors."""
    parts = [posterior.uncertainty(model.encode(part).mean) for part in pixels.split(BATCH)]
    mean, std = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    error = (mean - to_float(pixels)).square()
    images = {"real": pixels[:SHOWN], "given back, mean": to_uint8(mean[:SHOWN])}
    show(images, {"its deviation": std[:SHOWN], "error": error[:SHOWN].sqrt()}, plots / "reconstructions.png")
    drawn, spread = posterior.uncertainty(model.sample_latents(texts, seed=seed_for(seed, "posterior")))
    show({"mean": to_uint8(drawn)}, {"its deviation": spread}, plots / "samples.png")
    return {"uncertainty_error_rank_correlation": float(spearmanr(std.flatten(), error.flatten()).statistic)}


def show(images: dict[str, Tensor], maps: dict[str, Tensor], path: Path) -> None:
    """A row of each of the images (N, C, H, W), uint8, and of each map, non-negative, its largest percent white."""
    rows = dict(images)
    for name, values in maps.items():
        white = max(float(np.quantile(values.cpu(), 0.99)), TINY)
        scaled = (values / white * 255).round().clamp(max=255).to(torch.uint8)
        rows[f"{name}, white: {white / BIN:.2g} of 255 or more"] = scaled
    pictures = torch.cat([row.cpu() for row in rows.values()]).numpy()
    image_grid(pictures, len(pictures) // len(rows), path, row_labels=list(rows))


def separated(posterior: DecoderPosterior, pixels: Tensor, seed: int, plots: Path) -> tuple[np.ndarray, Metrics]:
    """Scores of images, and how well they tell them from the same turned or inverted, and from noise (AUROC)."""
    noise = torch.randint(0, 256, pixels.shape, generator=generator(seed, "posterior noise")).to(torch.uint8)
    others = {"rotated": pixels.rot90(1, (2, 3)), "inverted": 255 - pixels, "noise": noise}
    scores = {name: posterior.scores(images).numpy() for name, images in {"held out": pixels, **others}.items()}
    histograms({name: np.maximum(values, TINY) for name, values in scores.items()}, plots / "scores.png",
              title="Spread of the bound over posterior samples", x_label="nats")  # fmt: skip
    labels = np.repeat([0, 1], len(pixels))
    areas = {f"ood_auroc_{name}": float(roc_auc_score(labels, np.append(scores["held out"], scores[name]))) for name in others}
    return scores["held out"], areas


def write(root: Path, sampler: str, posterior: DecoderPosterior, scores: pd.DataFrame, metrics: Metrics) -> None:
    folder = root / POSTERIOR / sampler
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    about = {"autoencoder": network_hash(root / MODEL / "autoencoder"), "sampler": sampler}
    posterior.draws.save(folder / "samples.safetensors", about)
    scores.to_csv(folder / "scores.csv", index=False)
    (root / POSTERIOR_REPORTS / f"{sampler}.json").write_text(canonical_json(metrics))


STAGE = Stage(
    "sample_posterior",
    run,
    settings=("seed", "deterministic", "posterior"),
    inputs=(SHARDS, MODEL, BOUNDS),
    outs=(f"{POSTERIOR}/${{item}}", f"{POSTERIOR_REPORTS}/${{item}}.json", f"{POSTERIOR_REPORTS}/${{item}}"),
    for_each="sample_posterior",
)

if __name__ == "__main__":
    stage_main(STAGE)
