"""Sample the posterior of weights of the trained decoder, and measure what an average over the samples is good for."""

import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from ldm.base.device import set_up
from ldm.base.errors import InputError
from ldm.base.files import canonical_json, folder_hash
from ldm.base.paths import BOUNDS, MODEL, POSTERIOR, POSTERIOR_REPORTS
from ldm.base.progress import Progress
from ldm.base.randomness import seed_for
from ldm.config import load_settings
from ldm.data.reader import stage_shards
from ldm.evaluation.posterior import measure
from ldm.langevin.decoder import DecoderChains, DecoderLoss, DecoderPosterior
from ldm.model import LatentDiffusion
from ldm.nets.diffusers import network_hash
from ldm.registry.tracking import stage_run
from ldm.stages.stage import stage_main, stage_params, stop_at_checkpoint
from ldm.stages.work import identify, opened
from ldm.training.checkpoint import CheckpointStore


def run(root: Path, sampler: str = "") -> None:
    settings = load_settings(root)
    options, seed = settings.posterior, settings.seed
    steps = options.burn_in + options.thin * options.draws
    if sampler not in ("sgld", "sghmc"):
        raise InputError(f"sample_posterior {sampler}: name a sampler, sgld or sghmc")
    device = set_up(settings.deterministic)
    train, test = stage_shards(root, "train"), stage_shards(root, "test").first_by_hash(settings.evaluate.test_images)
    model = LatentDiffusion.load(root / MODEL, device)
    inputs, layout = {"model": folder_hash(root / MODEL), "shards": train.digest}, {"device": str(device)}
    params = {"sampler": sampler, **stage_params(root, "sample_posterior", settings)}
    folder, plots = root / POSTERIOR / sampler, root / POSTERIOR_REPORTS / sampler
    with (
        opened(root, identify(root, "sample_posterior", params, inputs, layout), steps, torch.get_num_threads()) as work,
        stage_run(f"sample_posterior_{sampler}", params, work.run_key, work.tags()) as tracker,
    ):
        loss = DecoderLoss(model.autoencoder, model.likelihood, train.images, len(train), options.part, seed)
        chains, store = DecoderChains(loss, sampler, **options.model_dump(exclude={"part"})), CheckpointStore(work.checkpoint)
        chains.run(store.load(), store.save, stop_at_checkpoint)
        step_size, posterior = chains.limits(), DecoderPosterior(model.autoencoder, model.likelihood, chains.draws())
        latents = partial(model.bound_latents, seed=seed)
        samples = partial(model.sample_latents, seed=seed_for(seed, "posterior"))
        with Progress(f"sample_posterior: {sampler}: measuring the samples"):
            scores, metrics = measure(posterior, test, pd.read_csv(root / BOUNDS), latents, samples, seed, plots)
        metrics |= {"sampler": sampler, **step_size.metrics(chains.lr)}
        warnings = [*metrics["step_size_warnings"], *metrics["convergence_warnings"]]
        summary = f"{metrics['average_bits_per_dim']:.4f} bits/dim averaged over {metrics['draws']} samples"
        metrics["summary"] = summary + (f"; {len(warnings)} warnings" if warnings else "")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        about = {"autoencoder": network_hash(root / MODEL / "autoencoder"), "sampler": sampler}
        posterior.draws.save(folder / "samples.safetensors", about)
        scores.to_csv(folder / "scores.csv", index=False)
        plots.with_suffix(".json").write_text(canonical_json(metrics))
        work.note_adopted(folder)
        tracker.log({name: value for name, value in metrics.items() if isinstance(value, int | float)}, 0)
        tracker.artifact(plots, "plots")
        work.finish()
    for warning in warnings:
        print(f"sample_posterior: warning: {warning}", flush=True)
    before, after, gain, error = (metrics[n] for n in ("bits_per_dim", "average_bits_per_dim", "gain_nats", "gain_nats_se"))
    print(f"sample_posterior: {before:.4f} bits/dim as trained, {after:.4f} averaged (by {gain:.2f} ± {error:.2f} nats an image)")


if __name__ == "__main__":
    stage_main("sample_posterior", run)
