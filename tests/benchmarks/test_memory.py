"""What real pictures take: a million latents and captions read by index, 512 x 512 pixels with Stable Diffusion's networks.

`make bench` prints what was measured. `LDM_BENCH_GPU_GB` is the size of the card that a GPU is made to look like.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from benchmarks.test_data import photo
from latent_files import finish, write_holes
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.base import memory
from ldm.base.device import set_up
from ldm.base.memory import Parts
from ldm.base.pixels import to_float
from ldm.base.randomness import fill_rows
from ldm.bayes.likelihoods.discrete import DiscretizedLogistic
from ldm.data.encoding import write_latents
from ldm.data.latents import CAPTIONS, open_latents
from ldm.data.reader import open_shards
from ldm.data.shards import write_shards
from ldm.diffusion.options import Recipe
from ldm.evaluation.bounds import measure_bounds
from ldm.evaluation.evaluation import Evaluation
from ldm.evaluation.metrics.psnr import Psnr
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL
from ldm.nets.unet import UNet

COUNT, FILE, TOKENS, WIDTH, LATENT, BATCH = 10**6, 500, 77, 768, (4, 32, 32), 256
SD_VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512],
          "layers_per_block": 2, "norm_num_groups": 32, "mid_block_add_attention": True}  # fmt: skip
SD_UNET = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 768, "layers_per_block": 2, "num_heads": 8,
           "block_out_channels": [320, 640, 1280, 1280], "attention": ["cross", "cross", "cross", "none"]}  # fmt: skip
IMAGES, SIDE = 40, 512


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents and captions of 150 GB, in sparse files."""
    folder, files = tmp_path_factory.mktemp("million"), []
    for number in range(COUNT // FILE):
        write_holes(folder / f"{number}.safetensors", dict.fromkeys(("mean", "logvar"), (torch.float32, (FILE, *LATENT))))
        files.append({"name": f"{number}.safetensors", "split": "train", "count": FILE, "shape": list(LATENT[1:])})
    for number in range(COUNT // FILE):
        write_holes(folder / f"{number}.text.safetensors", {"rows": (torch.bfloat16, (FILE * TOKENS, WIDTH))})
        files.append({"name": f"{number}.text.safetensors", "split": CAPTIONS, "count": FILE})
    counts, zeros = np.full(COUNT, TOKENS), [0.0] * LATENT[0]
    finish(folder, files, captions=np.arange(COUNT)[:, None], counts=counts, width=WIDTH, mean=zeros, std=[1.0] * LATENT[0])
    return folder


READ = f"""
import sys, time
from pathlib import Path
import numpy as np, torch
from ldm.base.device import reuse_freed_memory
from ldm.data.batches import order
from ldm.data.latents import open_latents

def resident():  # MB that only this process holds: pages of files are the system's to take back
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1e3

before, start = resident(), time.perf_counter()
latents = open_latents(Path(sys.argv[1]), "train")
seconds, opened = time.perf_counter() - start, resident() - before
reuse_freed_memory()  # as the stages do on a CPU
for what, read in (
    ("latents", latents.moments),
    ("captions", latents.embeddings),
    ("both", lambda index: (latents.moments(index), latents.embeddings(index))),
):
    for place, size in (("anywhere", len(latents)), ("in the system's cache", 16 * {BATCH})):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < 6:
            if place != "anywhere" and count == size:  # the first pass has filled the cache
                start = time.perf_counter()
            read(order(0, len(latents), count % size, {BATCH}))
            count += {BATCH}
        if place != "anywhere":
            count -= size
        print(f"  {{what}}, {{place}}: {{count / (time.perf_counter() - start):,.0f}}/s")
print(f"  opened in {{seconds:.2f}} s with {{opened:.0f}} MB, {{resident() - before:.0f}} MB at the end")
"""


def test_a_million_latents_and_captions(million: Path) -> None:
    print(f"\n{COUNT:,} latents {'x'.join(map(str, LATENT))} and captions {TOKENS}x{WIDTH}, in random batches of {BATCH}")
    subprocess.run([sys.executable, "-c", READ, str(million)], check=True)


def test_noise_of_a_batch_on_eight_ranks() -> None:
    """Posterior noise and noise of 2,048 latents 4 x 64 x 64: one process draws all, or a rank its eighth."""
    device, seconds = set_up(deterministic=True), {}
    for count in (2048, 256):
        out, times = torch.empty(count, 2, 4, 64, 64, device=device), []
        for _ in range(5):
            start = time.perf_counter()
            fill_rows(out, range(count), 0, "noise")
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds[count] = median(times)
    share = seconds[256] / seconds[2048]
    print(f"\nnoise of 2,048 latents on {device}: {seconds[2048]:.3f} s whole, {seconds[256]:.3f} s an eighth, {share:.3f} of it")


class Peak:
    """The most memory that this process, or its GPU, has held."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def gigabytes(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved() / 1e9
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e6


def text_encoder(folder: Path) -> dict[str, object]:
    """CLIP's text tower in Stable Diffusion's size, with random weights, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {chr(n): n for n in range(32, 127)} | {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = CLIPTextConfig(**size, vocab_size=128, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    CLIPTextModel(config).save_pretrained(folder)
    return {"kind": "transformers", "model": str(folder), "max_tokens": 77}


@pytest.mark.parametrize("parts", ["of an eighth", "too large"])
def test_encoding_and_evaluation_at_512_pixels(parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion's autoencoder and U-Net with random weights on a few photographs: rates, and the peak of each step.

    On a GPU also with parts that do not fit, so that smaller ones are tried.
    """
    device = set_up(deterministic=True)
    if device.type == "cuda":
        card = float(os.environ.get("LDM_BENCH_GPU_GB", "24")) * 1e9
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, card / torch.cuda.get_device_properties(device).total_memory))
        monkeypatch.setenv("LDM_MEMORY_GB", str(card / 8e9 if parts == "of an eighth" else 1000))
        monkeypatch.setattr(memory, "SHARE", 1)
        monkeypatch.setattr(memory, "CROWDED", 1)
    elif parts == "too large":
        pytest.skip("a CPU's memory has no limit that a process could run into and go on")
    few = device.type == "cpu"
    random, source = np.random.default_rng(0), tmp_path / "source"
    source.mkdir()
    for number in range(IMAGES if not few else 12):
        photo(random, SIDE, SIDE).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(f"a photograph of noise, number {number}" + ", which goes on" * (number % 4))
    options = {"image_size": SIDE, "channels": 3, "val_fraction": 0.2, "test_fraction": 0.3, "shard_size": 512}
    write_shards(source, tmp_path / "shards", max_bad_fraction=0, **options)
    readers = {split: open_shards(tmp_path / "shards", split) for split in ("train", "val", "test")}
    torch.manual_seed(0)
    vae, likelihood = AutoencoderKL(**SD_VAE).place(device).eval(), DiscretizedLogistic().build().to(device)
    unet = UNet(**SD_UNET, norm_num_groups=32).place(device)
    print(
        f"\n{SIDE} pixels, Stable Diffusion's networks, {device}" + (f" made to look like {card / 1e9:.0f} GB" if not few else "")
    )

    def step(name: str, count: int, start: float, peak: Peak) -> None:
        seconds = time.perf_counter() - start
        print(f"  {name}: {count / seconds:.2f} images/s, {peak.gigabytes():.1f} GB at most", flush=True)

    from ldm.base.options import chosen
    from ldm.nets.text.encoder import Text

    text = text_encoder(tmp_path / "clip")
    encoder = chosen(Text, text).build(device=device)
    identity = {"autoencoder": "a", "text_encoder": encoder.sha256, "text": text, "text_width": encoder.width}

    @torch.inference_mode()
    def encode(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        q = vae.encode(to_float(images).to(device))
        return q.mean.cpu(), q.logvar.cpu()

    peak, start = Peak(device), time.perf_counter()
    some = {split: readers[split] for split in ("train", "val")}
    write_latents(some, tmp_path / "latents", encode, encoder, identity, lambda done: None, store=tmp_path / "store", code="",
                  divide=Parts(device), texts=lambda row: [row["text"]])  # fmt: skip
    step("encoding", sum(map(len, some.values())), start, peak)
    manifest = open_latents(tmp_path / "latents", "train").manifest
    sampling = {"sampler": {"kind": "dpmpp_2m"}, "schedule": "karras", "steps": 2 if few else 16, "guidance": 3.0,
                "guidance_interval": None, "guidance_rescale": 0.0}  # fmt: skip
    diffusion = {"prediction": "v", "noise": {"kind": "cosine"}}
    recipe = Recipe(
        diffusion, "a", manifest["preprocessing"], manifest["latent_mean"], manifest["latent_std"],
        {"options": text, "sha256": encoder.sha256}, sampling,
    )  # fmt: skip
    model = LatentDiffusion(vae, likelihood, unet, recipe)
    test, count = readers["test"].first_by_hash(2 if few else 12), 2 if few else 16
    evaluation = Evaluation(model, readers["train"], test, 0, count, 1)

    def sampled() -> int:
        assert evaluation.samples[0].shape == (3, SIDE, SIDE)
        return len(evaluation.samples)

    for name, function, images in (
        ("bounds", lambda: measure_bounds(evaluation, 1 if few else 4, 1), len(test)),
        ("reconstructions", lambda: Psnr().measure(evaluation), len(test)),
        ("samples", sampled, count),
    ):
        peak, start = Peak(device), time.perf_counter()
        assert function()
        step(name, images, start, peak)
