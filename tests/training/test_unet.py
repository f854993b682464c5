"""The U-Net's objective against textbook weights, exact means and one process, whole or shared out."""

import functools
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from latent_files import write_cache
from ranks import run_two_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.base import distributed
from ldm.base.options import kinds
from ldm.base.randomness import fill_rows, generator
from ldm.data.latents import EMPTY, Latents, open_latents
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import Cosine, LogNormal, Noise, NoiseLevels
from ldm.nets.unet import UNet
from ldm.registry.tracking import Run
from ldm.training import fit as loop
from ldm.training import unet as module
from ldm.training.checkpoint import CheckpointStore
from ldm.training.fit import Execution, fit
from ldm.training.optimizers import AdamW
from ldm.training.unet import Mapped, Resident, Share, Uncertainty, UnetObjective, by_quarter, is_small, quarters
from ldm.training.weighting import LossWeight, MinSnr

CPU = torch.device("cpu")
KINDS = {"eps": "cosine", "x0": "cosine", "v": "cosine", "edm": "lognormal", "flow": "logitnormal"}


def levels_of(kind: str) -> NoiseLevels:
    return kinds(Noise)[KINDS[kind]]().build()


CHANNELS, SIDE, WIDTH, CAPTIONS = 1, 8, 8, 6
FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # which end with this process


def write_latents(folder: Path, embedded: bool = True, several: bool = False) -> Path:
    """40 latents in two files, in two shapes if asked for, each with two of six captions, as the cache keeps them."""
    random = torch.Generator().manual_seed(0)
    shapes = [(24, CHANNELS, SIDE, SIDE), (16, CHANNELS, SIDE, SIDE + 4 * several)]
    moments = [tuple(torch.randn(2, *shape, generator=random).unbind(0)) for shape in shapes]
    moments = [(3 * mean + 1, logvar - 2) for mean, logvar in moments]
    counts = [1, 2, 3, 4, 3, 2]
    rows = torch.randn(sum(counts), WIDTH, generator=random).bfloat16() if embedded else torch.arange(97, 112).byte()
    captions = [[1 + i % 5, 1 + (i + 1) % 5] for i in range(40)]
    return write_cache(folder / "latents", moments, captions, rows, counts, WIDTH, [1.0], [3.0])


@functools.cache
def latents(embedded: bool = True, several: bool = False) -> Latents:
    FOLDERS.append(tempfile.TemporaryDirectory(prefix="latents-"))
    return open_latents(write_latents(Path(FOLDERS[-1].name), embedded, several), "train")


def embed(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Of the rows' letters: a token each."""
    mask = torch.arange(max(map(len, texts))) < torch.tensor([len(text) for text in texts])[:, None]
    tokens = torch.tensor([[ord(c) for c in text.ljust(mask.shape[1])] for text in texts])
    return (tokens[..., None] - 100 + torch.arange(WIDTH)) / 8 * mask[..., None], mask


def objective(
    loss_weight: str = "standard", kind: str = "v", device: torch.device = CPU, data: Latents | None = None, **options: Any
) -> UnetObjective:
    torch.manual_seed(0)
    net = UNet(1, 1, (16, 16), 1, ("none", "cross"), 8, 2, 8).place(device)
    chosen = SimpleNamespace(caption_dropout=0.2, loss_weight=kinds(LossWeight)[loss_weight]())
    return UnetObjective(Denoiser(net, kind, levels_of(kind)), data or latents(), chosen, 3, device, **options)


# weights


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_of_x0_the_same_for_every_kind(kind: str) -> None:
    """min(SNR, gamma) |x0 - D(x)|², as Hang et al. 2023 have it for a network that predicts x0."""
    random = torch.Generator().manual_seed(1)
    denoiser = Denoiser(Last(), kind, levels_of(kind)).double()
    x0, noise = torch.randn(2, 50, 1, 4, 4, generator=random, dtype=torch.float64)
    sigma = torch.logspace(-2, 1.9, 50, dtype=torch.float64)
    estimate = denoiser(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma).numpy()
    snr = 1 / sigma.numpy() ** 2
    expected = np.minimum(snr, 5.0) * ((x0.numpy() - estimate) ** 2).mean((1, 2, 3))
    found = MinSnr(gamma=5.0).weighted(denoiser.loss(x0, noise, sigma), sigma, denoiser, None)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


class Last(nn.Module):
    """Any function of what a network sees."""

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return torch.tanh(2 * x + timesteps.view(-1, 1, 1, 1) / 1000)


def test_min_snr_has_the_papers_forms_for_eps_and_v() -> None:
    sigma = torch.logspace(-2, 1.9, 50, dtype=torch.float64)
    snr = 1 / sigma.numpy() ** 2
    for kind, expected in {"eps": np.minimum(snr, 5) / snr, "v": np.minimum(snr, 5) / (snr + 1)}.items():
        denoiser = Denoiser(Last(), kind, Cosine().build())
        found = MinSnr(gamma=5.0).weighted(torch.ones_like(sigma), sigma, denoiser, None)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def at_position(found: UnetObjective, position: int, count: int, part: slice | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    return found.loss(position, count, generator(0, "loss", position), part or slice(0, count))


def test_what_is_minimised_and_what_is_reported() -> None:
    """Of one image: the weighted loss, and the standard one beside it, the same whatever the weight is."""
    standard, metrics = at_position(objective(), 8, 1)
    assert "mse" not in metrics
    for weight in ("min_snr", "learned"):
        loss, metrics = at_position(objective(weight), 8, 1)
        assert float(metrics["mse"].detach()) == float(standard.detach())
        (quarter,) = (i for i in range(1, 5) if metrics[f"loss_noise_q{i}"])
        assert float(metrics[f"loss_noise_q{quarter}"]) == pytest.approx(4 * float(standard.detach()), rel=0.01)
        if weight == "learned":
            assert float(loss.detach()) == float(standard.detach())  # it starts at u = 0
    sigma = float(Cosine().build().draw(1, generator(0, "loss", 8)))
    loss, _ = at_position(objective("min_snr"), 8, 1)
    expected = min(1 / sigma**2, 5.0) / (1 / sigma**2 + 1) * float(standard.detach())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_learned_weight_scales_the_networks_gradient_and_has_one_of_its_own() -> None:
    plain, learned = objective(), objective("learned")
    with torch.no_grad():
        learned.module["weight"].weight.normal_(generator=torch.Generator().manual_seed(0))
    standard, loss = (at_position(found, 8, 1)[0] for found in (plain, learned))
    standard.backward(), loss.backward()
    pairs = list(zip(plain.denoiser.net.parameters(), learned.denoiser.net.parameters(), strict=True))
    ratio = float(torch.stack([(b.grad * a.grad).sum() for a, b in pairs]).sum() / sum(a.grad.square().sum() for a, _ in pairs))
    assert abs(np.log(ratio)) > 0.1
    for a, b in pairs:
        assert float((b.grad - ratio * a.grad).norm() / b.grad.norm().clamp(min=1e-3)) < 1e-3
    assert float(loss.detach()) == pytest.approx(float(standard.detach()) * ratio - np.log(ratio), rel=1e-4)  # exp(-u), u
    assert learned.module["weight"].weight.grad.abs().max() > 0


def test_an_uncertainty_comes_to_the_log_of_the_loss_at_each_level() -> None:
    """With EDM2's Fourier features it can follow a loss that falls over three orders of magnitude, and one with a dent."""
    module, levels = Uncertainty(), LogNormal().build()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)

    def mean_loss(sigma: Tensor) -> Tensor:
        return sigma.pow(-1.5) * (1 - 0.5 * torch.exp(-sigma.log().add(1.2).square()))

    random = torch.Generator().manual_seed(0)
    for _ in range(600):
        sigma = levels.draw(64, random)
        loss = mean_loss(sigma) * (0.8 + 0.4 * torch.rand(64, generator=random))
        module(loss, sigma).mean().backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    sigma = levels.quantile(torch.linspace(0.02, 0.98, 97, dtype=torch.float64)).float()
    np.testing.assert_allclose(module.u(sigma).detach(), mean_loss(sigma).log(), atol=0.15)


# loss by noise level


@pytest.mark.parametrize("noise", kinds(Noise))
@pytest.mark.parametrize("sigma_max", [3.0, 80.0])
def test_quarters_are_means_over_the_levels_of_training(noise: str, sigma_max: float) -> None:
    """Over all levels at once each is the mean within its quarter, also of a table of no multiple of four."""
    levels = kinds(Noise)[noise](sigma_max=sigma_max).build()
    count = len(levels.table)
    sigma = levels.quantile((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()
    loss = torch.rand(count, generator=torch.Generator().manual_seed(0))
    boundaries, shares = quarters(levels)
    found = by_quarter(loss, sigma, boundaries, shares)
    starts = np.floor(np.arange(5) * count / 4).astype(int)
    expected = [part.astype(np.float64).mean() for part in np.split(loss.numpy(), starts[1:-1])]
    assert list(found) == ["loss_noise_q1", "loss_noise_q2", "loss_noise_q3", "loss_noise_q4"]
    np.testing.assert_allclose([float(value) for value in found.values()], expected, rtol=1e-5)
    np.testing.assert_allclose(shares, np.diff(starts) / count, rtol=1e-6)


def test_quarters_of_three_levels_are_numbers() -> None:
    levels = NoiseLevels(Cosine(), torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64))
    found = by_quarter(torch.ones(3), levels.table.float(), *quarters(levels))
    assert [float(value) for value in found.values()] == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("weight", ["standard", "min_snr", "learned"])
def test_the_loss_and_metrics_of_a_batch_are_the_sum_of_its_parts(weight: str) -> None:
    """And the quarters' sum is four times the mean loss."""
    found = objective(weight)
    loss, metrics = at_position(found, 24, 8)
    parts = [at_position(found, 24, 8, part) for part in (slice(0, 3), slice(3, 8))]
    for name, value in {"loss": loss, **metrics}.items():
        first, second = (float({"loss": a, **b}[name].detach()) for a, b in parts)
        assert (3 * first + 5 * second) / 8 == pytest.approx(float(value.detach()), rel=1e-5), name
    mean = float(metrics.get("mse", loss).detach())
    assert sum(float(metrics[f"loss_noise_q{i}"]) for i in range(1, 5)) == pytest.approx(4 * mean, rel=0.02)


# where latents are


def test_latents_that_would_crowd_a_gpu_stay_in_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * 2 * 40 * CHANNELS * SIDE * SIDE + 2 * 15 * WIDTH
    assert latents().nbytes == size
    for free, small in ((2 * size, True), (2 * size - 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        assert is_small(latents(), torch.device("cuda")) is small
    assert not is_small(latents(embedded=False), torch.device("cuda"))  # an encoder makes embeddings as they are needed
    assert not is_small(latents(), CPU)


@pytest.mark.parametrize("several", [False, True])
def test_latents_on_the_device_are_those_in_the_files(several: bool) -> None:
    cached = latents(several=several)
    resident, mapped = Resident(cached, CPU), Mapped(cached, CPU, None)
    for group in cached.groups.values():
        for start in range(0, len(group), 5):
            index = group[start : start + 5]
            captions = np.arange(len(index)) % CAPTIONS
            found, expected = (source.end(source.begin(index, captions)) for source in (resident, mapped))
            for name, one, other in zip(Share._fields, found, expected, strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other), name
            mean, logvar = cached.moments(index)
            torch.testing.assert_close(found.mean, (mean - 1) / 3)
            torch.testing.assert_close(found.std, (logvar / 2).exp() / 3)


def test_latents_of_two_shapes_are_not_read_together() -> None:
    cached = latents(several=True)
    one, other = (group[0] for group in cached.groups.values())
    with pytest.raises(ValueError, match=r"latents of \(8, \d+\) and \(8, \d+\): read those of one shape at a time"):
        cached.moments(np.array([one, other]))


# what a batch is made of


def test_captions_that_are_kept_as_text_are_embedded_for_each_batch() -> None:
    as_text, seen = latents(embedded=False), list[str]()

    def counted(texts: list[str]) -> tuple[Tensor, Tensor]:
        seen.extend(texts)
        return embed(texts)

    found = objective(data=as_text, encoder=counted)
    share, _ = found._share(8, 8)
    context, mask = embed(seen)
    assert torch.equal(share.context, context) and torch.equal(share.mask, mask)
    assert set(seen) <= {"a", "bc", "def", "ghij", "klm", "no"}  # the bytes of the captions, one after the other
    index, captions = found._chosen(8, 8, 0, 8)
    assert as_text.texts(captions) == seen and len(index) == 8


def test_dropout_and_the_choice_of_a_caption_are_functions_of_the_position() -> None:
    found, count = objective(), 20_000
    index, captions = found._chosen(0, count, 0, count)
    dropped = captions == EMPTY
    assert abs(dropped.mean() - 0.2) < 5 * math.sqrt(0.2 * 0.8 / count)
    expected = np.stack([1 + index % 5, 1 + (index + 1) % 5])  # the two captions of each
    assert ((captions == expected) | dropped).any(0).all()
    first = (captions == expected[0])[~dropped]
    assert abs(first.mean() - 0.5) < 5 * math.sqrt(0.25 / count)
    of_an_image = {int(c) for c in captions[index == index[0]]}  # over the epochs, all of them
    assert of_an_image == {EMPTY, *expected[:, 0]}
    for start, part in ((0, 50), (50, 25), (19_900, 100)):  # however positions are divided
        parts = found._chosen(0, count, start, part)
        assert np.array_equal(parts[0], index[start : start + part]) and np.array_equal(parts[1], captions[start : start + part])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_draws_the_noise_of_its_own_images_alone(several: bool, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of a batch is that of one rank, in parts: each draws its share of the numbers, into no other memory."""
    drawn: list[tuple[tuple[int, ...], list[int]]] = []

    def counted(out: Tensor, numbers: Any, *position: Any) -> Tensor:
        drawn.append((tuple(out.shape), list(numbers)))
        return fill_rows(out, numbers, *position)

    monkeypatch.setattr(module, "fill_rows", counted)
    monkeypatch.setattr(distributed, "ranks", lambda: ranks)
    losses = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        share = 8 // ranks
        loss, _ = at_position(objective(data=latents(several=several)), 16, 8, slice(rank * share, (rank + 1) * share))
        losses.append(float(loss.detach()))
    assert [number for _, numbers in drawn for number in numbers] == list(range(16, 24))
    assert {shape[0] for shape, _ in drawn} == {8 // ranks}
    monkeypatch.setattr(distributed, "ranks", lambda: 1)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    whole, _ = at_position(objective(data=latents(several=several)), 16, 8)
    assert np.mean(losses) == pytest.approx(float(whole.detach()), rel=1e-5)


# in the training loop


PLAN = {
    "images": 48, "batch_size": 8, "lr": 3e-4, "warmup_images": 0, "ema_halflife_images": 100, "checkpoint_images": 10_000,
    "optimizer": AdamW(weight_decay=0.01),
}  # fmt: skip


def train(
    folder: Path,
    execution: Execution = Execution(),  # noqa: B008
    should_stop: Callable[[], bool] = lambda: False,
    found: UnetObjective | None = None,
    **plan: int,
) -> dict[str, Tensor] | None:
    """Last and averaged weights and the curve, by default with a learned weight of noise levels; None where it was stopped."""
    found, store = found or objective("learned"), CheckpointStore(folder / "store")
    try:
        fitted = fit(
            found, SimpleNamespace(**PLAN | plan), seed=1, tracker=Run(), store=store, progress=lambda done, row: None,
            should_stop=should_stop, execution=execution,
        )  # fmt: skip
    except KeyboardInterrupt:
        return None
    last = distributed.full_tensors(found.module.state_dict())
    curve = {f"curve.{name}": torch.tensor([row[name] for row in fitted.curve]) for name in fitted.curve[0]}
    return {f"last.{k}": v for k, v in last.items()} | {f"ema.{k}": v for k, v in fitted.ema.items()} | curve


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weight", ["standard", "learned"])
def test_training_on_a_gpu_waits_for_nothing_wherever_latents_are(weight, tmp_path, monkeypatch) -> None:
    """Batches three to nine, between rows of the curve, raise where the host waits for the device."""
    monkeypatch.setattr(loop, "SYNC_SECONDS", math.inf)
    objectives = [objective(weight, device=torch.device("cuda"))]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    objectives.append(objective(weight, device=torch.device("cuda")))
    assert [type(found.source) for found in objectives] == [Resident, Mapped]
    near, far = (float(at_position(found, 8, 8)[0].detach()) for found in objectives)
    assert near == far
    for place, found in enumerate(objectives):
        seen: list[int] = []

        def strict_for_a_while(seen=seen) -> bool:
            seen.append(0)
            torch.cuda.set_sync_debug_mode("error" if 1 < len(seen) < 9 else "default")
            return len(seen) == 9

        assert train(tmp_path / str(place), Execution(torch.bfloat16), strict_for_a_while, found, images=3200) is None
        assert len(seen) == 9


# several processes


def child(folder: Path) -> None:
    """One of two processes: trains with the model in each of them, then shared out, then so with a stop on the way."""
    torch.set_num_threads(1)
    loop.SYNC_SECONDS = 0.0  # after every batch
    shared, seen = Execution(shard=True, micro_batch=3), []
    with distributed.process_group(CPU):
        results = {
            "whole": train(folder / "whole"),
            "shared": train(folder / "shared", shared),
            "stopped": train(folder / "stopped", shared, lambda: seen.append(0) or len(seen) == 3),
        }
        torch.distributed.barrier()  # the first one has written its checkpoint
        if distributed.rank() == 0:
            shutil.copytree(folder / "stopped", folder / "for one")
        results["resumed"] = train(folder / "stopped", shared)
        for name, found in results.items():
            if distributed.rank() == 0 and found:
                save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("pair")
    code = f"import test_unet; test_unet.child(test_unet.Path({str(folder)!r}))"
    run_two_ranks(folder, code, Path(__file__).parent)
    return folder


@pytest.mark.parametrize("name", ["whole", "shared"])
def test_two_processes_train_the_same_u_net_as_one(name: str, pair: Path, tmp_path: Path) -> None:
    expected, found = train(tmp_path), load_file(pair / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    assert max(expected["curve.gradient_norm"]) > 1  # clipping was at work
    assert expected["last.weight.weight"].abs().max() > 1e-4
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_a_shared_u_net_resumes_to_the_same_bytes(pair: Path) -> None:
    assert not (pair / "stopped.safetensors").exists()
    assert (pair / "resumed.safetensors").read_bytes() == (pair / "shared.safetensors").read_bytes()


def test_one_process_goes_on_with_what_two_shared(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone, resumed = train(tmp_path), train(pair / "for one")
    assert "resuming after 24 images" in capsys.readouterr().out
    for key, value in alone.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
