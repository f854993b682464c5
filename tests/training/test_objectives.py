"""The autoencoder's objectives against closed forms and autograd by hand; on one process and on two."""

import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_two_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.base import distributed
from ldm.base.errors import InputError
from ldm.base.pixels import to_float
from ldm.base.randomness import generator
from ldm.bayes.elbo import elbo
from ldm.bayes.likelihoods.continuous import Laplace
from ldm.bayes.likelihoods.discrete import DiscretizedLogistic
from ldm.evaluation.autoencoder import fit_scale
from ldm.nets.adversary import PatchDiscriminator, Perceptual
from ldm.nets.autoencoder import AutoencoderKL, DiagonalGaussian, VQModel
from ldm.nets.regulariser import Kl, Vq
from ldm.registry.tracking import Run
from ldm.training.checkpoint import CheckpointStore
from ldm.training.fit import Execution, fit
from ldm.training.objectives import AdversarialObjective, LdmChoice, VaeObjective
from ldm.training.optimizers import AdamW, Sgld

PIXELS = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
ALL = slice(0, 8)


class Images:
    """Eight images, whatever the position; a rank gets its share."""

    seed = 5

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks = rank, ranks

    def at(self, position: int, batch_size: int) -> Tensor:
        return PIXELS.chunk(self.ranks)[self.rank]


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(3, 3, 2, [8, 16], norm_num_groups=4)


def elbo_objective(**rate: float) -> VaeObjective:
    return VaeObjective(autoencoder(), DiscretizedLogistic().build(), Images(), Kl(**rate))


def adversarial(*, start: int = 0, weight: float = 0.5, perceptual: float = 1.0, images: Images | None = None, **rate: float):
    net = autoencoder()
    torch.manual_seed(3)
    options = LdmChoice(discriminator_start=start, discriminator_weight=weight, perceptual_weight=perceptual)
    plain = VaeObjective(net, Laplace(log_scale=-0.5).build(), images or Images(), Kl(**rate))
    return AdversarialObjective(plain, options, Perceptual(), PatchDiscriminator(3, 8, 1))


def noise_of(net: AutoencoderKL, x: Tensor, images_seen: int = 0) -> Tensor:
    """An image's own noise, whatever batch it is in."""
    shape = net.latent_shape(*x.shape[2:])
    return torch.stack([torch.randn(shape, generator=generator(Images.seed, "noise", images_seen + i)) for i in range(len(x))])


def loss_of(objective: VaeObjective, images_seen: int = 0) -> Tensor:
    return objective.loss(images_seen, 8, torch.Generator().manual_seed(2), ALL)[0]


def gradients(objective: VaeObjective, loss: Tensor) -> dict[str, Tensor]:
    objective.module.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.module.named_parameters() if p.grad is not None}


# the evidence lower bound


def test_the_loss_is_the_negative_elbo_per_value():
    objective = elbo_objective()
    x = to_float(PIXELS)
    noise = noise_of(objective.autoencoder, x)
    bound = elbo(objective.autoencoder, objective.likelihood, x, noise)
    loss, metrics = objective.loss(0, 8, torch.Generator().manual_seed(2), ALL)
    torch.testing.assert_close(loss, -bound.nats.mean() / 768)
    torch.testing.assert_close(metrics["kl_nats"], bound.kl.mean().detach())
    torch.testing.assert_close(metrics["distortion_nats"], -bound.reconstruction.mean())


def test_images_of_two_shapes_count_alike_in_nats() -> None:
    """The mean loss of all images, times the number of all values, is the negative bound of all data: what SGLD samples from."""
    shapes, nats, losses = {(16, 16): 6, (8, 24): 2}, 0.0, []
    values = sum(count * 3 * math.prod(shape) for shape, count in shapes.items())
    for (height, width), count in shapes.items():
        pixels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        images = SimpleNamespace(rank=0, seed=5, at=lambda position, batch_size, pixels=pixels: pixels)
        objective = VaeObjective(autoencoder(), DiscretizedLogistic().build(), images, Kl(), values / 8)
        noise = noise_of(objective.autoencoder, to_float(pixels))
        nats += elbo(objective.autoencoder, objective.likelihood, to_float(pixels), noise).nats.sum().item()
        losses += count * [objective.loss(0, count, torch.Generator().manual_seed(2), slice(0, count))[0].item()]
    assert np.mean(losses) * values == pytest.approx(-nats, rel=1e-5)


def test_beta_rises_over_its_warmup_and_weighs_the_kl_only():
    kl = elbo_objective().loss(0, 8, torch.Generator().manual_seed(2), ALL)[1]["kl_nats"].item() / 768
    for seen, share in ((0, 0.0), (25, 0.25), (100, 1.0), (1000, 1.0)):
        distortion = loss_of(elbo_objective(beta=0.0), seen).item()  # of the noise at this position
        loss = loss_of(elbo_objective(beta=4.0, beta_warmup_images=100), seen).item()
        assert loss == pytest.approx(distortion + 4 * share * kl, rel=1e-5)


def test_free_bits_are_a_floor_under_each_channel_of_each_image():
    objective = elbo_objective()
    channels = objective.autoencoder.encode(to_float(PIXELS)).kl().sum((2, 3)).detach()  # (B, c)
    floor = float(channels.flatten().sort().values[5])  # some below, some above
    expected = loss_of(elbo_objective(beta=0.0)) + channels.clamp(min=floor).sum(1).mean() / 768
    torch.testing.assert_close(loss_of(elbo_objective(free_bits=floor)), expected)
    high = elbo_objective(free_bits=1e6)
    assert gradients(high, loss_of(high)).keys() == gradients(objective, loss_of(objective)).keys()
    free = high.autoencoder.encoder.conv_in.weight.grad
    none = elbo_objective(beta=0.0)
    loss_of(none).backward()
    torch.testing.assert_close(free, none.autoencoder.encoder.conv_in.weight.grad)  # what is free has no gradient


def test_parts_of_a_batch_see_their_own_images_and_noise():
    objective = elbo_objective()
    parts = [objective.loss(0, 8, torch.Generator().manual_seed(2), slice(i, i + 2))[0] for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss_of(objective))


def test_a_vq_model_pays_for_pixels_and_for_the_distance_to_its_codes():
    torch.manual_seed(0)
    net = VQModel(3, 3, 2, [8, 16], norm_num_groups=4, num_vq_embeddings=8)
    likelihood = DiscretizedLogistic().build()
    objective = VaeObjective(net, likelihood, Images(), Vq(num_vq_embeddings=8))
    loss = loss_of(objective)
    x = to_float(PIXELS)
    h = net.encode(x).mean
    distance = torch.cdist(h.permute(0, 2, 3, 1).flatten(0, 2).double(), net.quantize.embedding.weight.double())
    squared = distance.min(1).values.square().mean() / 2  # a mean over two channels
    expected = -likelihood.log_prob(x, net.decode(h)).mean() + 1.25 * squared
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradients(objective, loss)
    for name in ("encoder.conv_in.weight", "decoder.conv_in.weight", "quantize.embedding.weight"):
        assert found[f"autoencoder.{name}"].abs().max() > 0


def test_bfloat16_reaches_neither_pixels_nor_posterior():
    """Only the inside of the networks: eight bits would be half a pixel value, and the bound would be off by as much."""
    objective, exact = elbo_objective(), elbo_objective()
    with torch.autocast("cpu", torch.bfloat16):
        posterior = objective.autoencoder.encode(to_float(PIXELS))
        inside = objective.autoencoder.decoder.mid_block(torch.randn(1, 16, 8, 8))[0]
        loss = loss_of(objective)
    assert inside.dtype == torch.bfloat16
    assert {posterior.mean.dtype, posterior.logvar.dtype, loss.dtype} == {torch.float32}
    assert loss.item() != loss_of(exact).item()
    assert loss.item() == pytest.approx(loss_of(exact).item(), rel=1e-2)
    found, expected = gradients(objective, loss), gradients(exact, loss_of(exact))
    for name, gradient in expected.items():
        cosine = F.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
        assert found[name].dtype == torch.float32 and (cosine > 0.98 or gradient.norm() < 1e-4), (name, cosine)


# the paper's objective


def by_hand(objective: AdversarialObjective) -> dict[str, Tensor]:
    """Gradients of autoencoder and discriminator, each with the other's weights held fixed, and the loss put together anew."""
    ours, net, options = objective, objective.autoencoder, objective.options
    x = to_float(PIXELS)
    posterior = net.encode(x)
    back = net.decode(posterior.sample(noise_of(net, x)))
    b = objective.likelihood.log_scale
    # as the paper's code has it
    error = (x - back).abs() + options.perceptual_weight * ours.perceptual(x, back).view(-1, 1, 1, 1)
    negative = (error / b.exp() + b + math.log(2)).mean()
    fooling = -ours.discriminator(back).mean()
    last = net.decoder.conv_out.weight
    ratio = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (negative, fooling)]
    weight = options.discriminator_weight * float(ratio[0] / (ratio[1] + 1e-4))
    kl = objective.regulariser.beta * posterior.kl().flatten(1).sum(1).mean() / 768
    others = [p for name, p in objective.module.named_parameters() if not name.startswith("discriminator")]
    total = torch.autograd.grad(negative + kl + weight * fooling, others, retain_graph=True)
    hinge = 0.5 * (F.relu(1 - ours.discriminator(x)) + F.relu(1 + ours.discriminator(back.detach()))).mean()
    names = [name for name, _ in objective.module.named_parameters()]
    return dict(zip(names, (*total, *torch.autograd.grad(hinge, list(ours.discriminator.parameters()))), strict=True))


def test_autoencoder_and_discriminator_get_the_gradients_of_their_own_losses():
    objective = adversarial(beta=1e-6)
    expected = by_hand(objective)
    found = gradients(objective, loss_of(objective))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    assert found["likelihood.log_scale"].abs() > 0  # the scale is trained
    groups = objective.parameter_groups()
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in objective.module.parameters()}  # and it is in the optimizer


class Mute(nn.Module):
    """What others have shipped: a perceptual network under `no_grad`."""

    def __init__(self, perceptual: Perceptual):
        super().__init__()
        self.perceptual = perceptual

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self.perceptual(x, y)


def reach(make: object, term: dict[str, float]) -> float:
    """How much a term changes the gradient of the decoder's first layer, as a share of it."""
    found = []
    for options in ({}, term):
        objective = make(**{"perceptual": 0.0, "weight": 0.0, "beta": 1e-6} | options)
        found.append(gradients(objective, loss_of(objective))["autoencoder.decoder.conv_in.weight"])
    return float((found[1] - found[0]).norm() / found[0].norm())


@pytest.mark.parametrize("term", [{"perceptual": 1.0}, {"weight": 0.5}], ids=["perceptual", "adversarial"])
def test_the_term_reaches_the_decoder(term):
    assert reach(adversarial, term) > 1e-2


def test_a_perceptual_network_without_gradient_would_be_noticed():
    def muted(**options: float) -> AdversarialObjective:
        objective = adversarial(**options)
        objective.perceptual = Mute(objective.perceptual)
        return objective

    assert reach(muted, {"perceptual": 1.0}) < 1e-6


def test_before_its_start_the_discriminator_has_no_say_and_no_gradient():
    objective = adversarial(start=100)
    early, late = (gradients(objective, loss_of(objective, seen)) for seen in (99, 100))
    without = adversarial(weight=0.0)
    expected = gradients(without, loss_of(without, 99))
    for name, gradient in early.items():
        if name.startswith("discriminator"):
            assert not gradient.any()  # present for other processes, and zero
            assert late[name].any() or name == list(early)[-1]  # the last bias moves real and fake alike
        else:
            torch.testing.assert_close(gradient, expected[name])


def test_the_adaptive_weight_makes_the_pulls_equal_at_the_last_layer():
    """With a discriminator weight of 1 both terms pull equally hard there."""
    full, half = adversarial(weight=1.0, beta=0.0), adversarial(weight=0.0, beta=0.0)
    name = "autoencoder.decoder.conv_out.weight"
    both, one = (gradients(objective, loss_of(objective))[name] for objective in (full, half))
    assert float((both - one).norm()) == pytest.approx(float(one.norm()), rel=1e-2)


# the perceptual distance


def plain_vgg(net: Perceptual, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Zhang et al. 2018, equation 1, in float64 by hand: unit feature vectors, squared differences, mean over positions."""
    total = np.zeros(len(x))
    maps = [(np.repeat(a, 3 // a.shape[1], 1) - net.mean.double().numpy()) / net.std.double().numpy() for a in (x, y)]
    for index, layer in enumerate(net.features):
        maps = [layer.double()(torch.from_numpy(a)).numpy() for a in maps]
        if index + 1 == len(net.features) or isinstance(net.features[index + 1], nn.MaxPool2d):
            a, b = (m / np.maximum(np.sqrt((m**2).sum(1, keepdims=True)), 1e-10) for m in maps)
            total += ((a - b) ** 2).sum(1).mean((1, 2))
    return total


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
def test_the_perceptual_distance_in_float64(channels: int):
    x, y = (torch.rand(2, channels, 12, 12, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in (0, 1))
    net = Perceptual(widths=((4, 4), (8,), (8, 8)))
    found = net(x, y).numpy()
    np.testing.assert_allclose(found, plain_vgg(net, x.double().numpy(), y.double().numpy()), rtol=1e-4)
    assert (net.float()(x, x) == 0).all()


SMALL = ((4, 4), (8, 8))
KEYS = ("features.0", "features.2", "features.5", "features.7")


def weights(path: Path) -> dict[str, Tensor]:
    shapes = [(4, 3), (4, 4), (8, 4), (8, 8)]
    state = {}
    for key, (out, inside) in zip(KEYS, shapes, strict=True):
        state |= {f"{key}.weight": torch.randn(out, inside, 3, 3), f"{key}.bias": torch.randn(out)}
    state |= {"classifier.0.weight": torch.randn(2, 2), "lin1.model.1.weight": torch.rand(1, 8, 1, 1)}
    save_file(state, path)
    return state


def sha256(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_perceptual_weights_come_from_a_file_with_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(Perceptual, "VGG16", SMALL)
    state = weights(tmp_path / "vgg.safetensors")
    torch.save(state, tmp_path / "vgg.pth")
    nets = [Perceptual.from_file(tmp_path / name, sha256(tmp_path / name)) for name in ("vgg.safetensors", "vgg.pth")]
    for net in nets:
        for key in KEYS:
            assert torch.equal(net.state_dict()[f"{key}.weight"], state[f"{key}.weight"])
        assert torch.equal(net.lin1, state["lin1.model.1.weight"].flatten())
        assert torch.equal(net.lin0, torch.ones(4))
        assert not any(p.requires_grad for p in net.parameters())


def test_perceptual_weights_of_another_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Perceptual, "VGG16", SMALL)
    path = tmp_path / "vgg.safetensors"
    weights(path)
    with pytest.raises(InputError, match=r"vgg.safetensors: sha256 is [0-9a-f]{64}, perceptual_sha256 says 00"):
        Perceptual.from_file(path, "00")
    with pytest.raises(InputError, match="no such file"):
        Perceptual.from_file(tmp_path / "none", "00")
    save_file({key: value for key, value in load_file(path).items() if key != "features.5.weight"}, path)
    with pytest.raises(InputError, match=r"vgg.safetensors: not .*torchvision.*Missing key.*features.5.weight"):
        Perceptual.from_file(path, sha256(path))
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(InputError, match=r"text.pth: not the weights .*: cannot be read as weights"):
        Perceptual.from_file(tmp_path / "text.pth", sha256(tmp_path / "text.pth"))


def test_logits_of_an_image_depend_on_no_other():
    torch.manual_seed(0)
    net = PatchDiscriminator(3, 8, 2)
    x = to_float(PIXELS)
    torch.testing.assert_close(net(x)[:3], net(x[:3]))


# the scale of a likelihood fitted afterwards


def test_the_fitted_scale_is_the_likeliest():
    """On residuals of a logistic whose scale is known, decoded by an autoencoder that always returns a constant."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
            return 1, 1, 1

        def encode(self, x: Tensor):
            return DiagonalGaussian(torch.zeros(len(x), 1, 1, 1), torch.zeros(len(x), 1, 1, 1))

        def decode(self, z: Tensor) -> Tensor:
            return torch.zeros(len(z), 1, 16, 16)

    drawn = np.random.default_rng(0).logistic(0, 0.05, (400, 1, 16, 16))
    pixels = np.clip(np.round((drawn + 1) * 127.5), 0, 255).astype(np.uint8)

    class Reader:
        shapes: ClassVar = {(16, 16): np.arange(len(pixels))}

        def __len__(self) -> int:
            return len(pixels)

        def subset(self, positions: np.ndarray) -> "Reader":
            assert len(positions) == len(pixels)
            return self

        def images(self, positions: np.ndarray) -> np.ndarray:
            return pixels[positions]

    found = fit_scale(Constant(), Reader(), seed=0)
    assert found.log_scale.exp().item() == pytest.approx(0.05, rel=0.02)


# two processes

SCRIPT = """
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_objectives
from ldm.base import distributed
from ldm.training import fit as loop

class Bypassed(torch.nn.parallel.DistributedDataParallel):
    def forward(self, *args):
        return self.module(*args)  # past the wrapper that synchronises

with distributed.process_group(torch.device("cpu")):
    for kind, micro_batch in test_objectives.TRAININGS:
        if kind == "planted":
            loop.DistributedDataParallel = Bypassed
        test_objectives.train(Path(folder) / kind, kind, micro_batch)
"""
TRAININGS = (
    ("paper", 0),
    ("elbo", 3),
    ("langevin", 0),
    ("planted", 0),
)  # the objective, and at most how many images a pass takes


def train(folder: Path, kind: str, micro_batch: int = 0) -> dict[str, Tensor]:
    """Weights, averages and losses of this process after six steps; written to its file, too."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = distributed.rank()
    langevin = kind == "langevin"
    plan = SimpleNamespace(images=48, batch_size=8, warmup_images=0, ema_halflife_images=20, checkpoint_images=16)
    plan.lr, plan.optimizer = (1e-6, Sgld()) if langevin else (1e-3, AdamW(weight_decay=0.01))
    images = Images(rank, distributed.ranks())
    objective = elbo_objective() if kind in ("elbo", "langevin") else adversarial(start=16, beta=1e-6, images=images)
    objective.batches = images
    execution = Execution(micro_batch=micro_batch or None)
    store = CheckpointStore(folder / f"store{rank}")
    fitted = fit(objective, plan, seed=1, tracker=Run(), store=store, progress=print, execution=execution, num_data=8 * 768)
    tensors = {k: v.contiguous() for k, v in objective.module.state_dict().items()}
    tensors |= {f"ema.{k}": v.contiguous() for k, v in fitted.ema.items()}
    tensors["losses"] = torch.tensor([row["loss"] for row in fitted.curve])
    save_file(tensors, folder / f"rank{rank}.safetensors")
    return tensors


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """What two processes have trained together: a folder for each of `TRAININGS`."""
    folder = tmp_path_factory.mktemp("two")
    run_two_ranks(folder, f"folder = {str(folder)!r}\n{SCRIPT}", Path(__file__).parent)
    return folder


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [key for key in a if not torch.equal(a[key], b[key])]


@pytest.mark.parametrize("kind", ["paper", "elbo", "langevin"])
def test_two_processes_train_one_model_the_same_as_one_process(kind, two_ranks, tmp_path):
    """Gradients that were not synchronised would part the ranks; wrongly scaled ones would part them from one process.

    Each has four of eight images: three and one, where passes take three at most. Noise of their own would part them, too.
    """
    alone = train(tmp_path, kind)
    first, second = (load_file(two_ranks / kind / f"rank{rank}.safetensors") for rank in range(2))
    assert not differences(first, second)
    assert first.keys() == alone.keys()
    for key, value in alone.items():  # Adam's first steps have the sign of a gradient, which rounding decides where it is 0
        apart = ~torch.isclose(first[key], value, rtol=1e-3, atol=2e-4)
        assert apart.double().mean() <= (0.01 if kind == "paper" else 0.0), key


def test_a_network_called_past_the_wrapper_would_be_noticed(two_ranks):
    first, second = (load_file(two_ranks / "planted" / f"rank{rank}.safetensors") for rank in range(2))
    assert "autoencoder.decoder.conv_in.weight" in differences(first, second)
