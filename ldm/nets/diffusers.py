"""Networks in diffusers' folder format: `config.json` and `diffusion_pytorch_model.safetensors`."""

import functools
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ldm.base.errors import InputError
from ldm.base.files import content_hash, file_hash
from ldm.base.tensors import save_tensors
from ldm.nets.blocks import Block, per_level

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
OLD_KEYS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # diffusers before 0.12


def network_hash(folder: Path) -> str:
    """Identity of a saved network: of its configuration and weights, not of what else is in the folder."""
    return content_hash("".join(file_hash(folder / name) for name in (CONFIG, WEIGHTS)).encode())


def registered(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate a constructor so that its arguments are kept in `config`, from which `save_pretrained` writes config.json."""

    @functools.wraps(init)
    def constructor(self: "Pretrained", *args: Any, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        bound = inspect.signature(init).bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        self.config = {name: list(value) if isinstance(value, list | tuple) else value for name, value in given}
        self.carried = {}
        init(self, *args, **kwargs)

    return constructor


class Pretrained(nn.Module):
    """A network that is saved and loaded as diffusers does."""

    CLASS: ClassVar[str]  # diffusers' name of the network
    DOWN: ClassVar[Mapping[Any, str]]  # diffusers' names of the blocks by kind of attention, the first without any
    UP: ClassVar[Mapping[Any, str]]
    DEFAULTS: ClassVar[dict[str, Any]]  # diffusers' defaults of the configuration keys that are read
    FIXED: ClassVar[dict[str, Any]]  # configuration keys with one supported value; keys in none of these must be null
    CARRIED: ClassVar[tuple[str, ...]]  # configuration keys that change no output, written back as they were read

    config: dict[str, Any]  # the constructor's arguments
    carried: dict[str, Any]

    def blocks(self) -> list[Block]:
        """The parts that are sharded, or computed twice, one by one."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Whether training keeps only the inputs of the blocks and computes the rest twice (Chen et al. 2016)."""
        for block in self.blocks():
            block.recompute = on

    def place(self, device: torch.device | str) -> Self:
        """Move to a device, in channels-last layout, which convolutions run faster in."""
        return self.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def to_diffusers(cls, config: dict[str, Any]) -> dict[str, Any]:
        """diffusers' configuration from the constructor's arguments."""
        down = [cls.DOWN[kind] for kind in config["attention"]]
        up = [cls.UP[kind] for kind in reversed(config["attention"])]
        return {key: config[key] for key in cls.DEFAULTS if key in config} | {"down_block_types": down, "up_block_types": up}

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments from diffusers' configuration, defaults included."""
        kinds = {name: kind for kind, name in cls.DOWN.items()}
        down = per_level(config["down_block_types"], config["block_out_channels"], "down_block_types")
        attention = [kinds.get(name, next(iter(cls.DOWN))) for name in down]
        return {key: config[key] for key in cls.DEFAULTS if not key.endswith("_types")} | {"attention": attention}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder; equal networks give equal bytes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": self.CLASS, **self.to_diffusers(self.config), **self.carried}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        state = {key: value.cpu().contiguous() for key, value in sorted(self.state_dict().items())}
        save_tensors(state, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """As `load_network`, for a network of this class."""
        return load_network(folder, cls)


def load_network(folder: str | Path, *kinds: type[Pretrained], shape_only: bool = False) -> Any:
    """The network of a folder that we or diffusers wrote, of the class that its config.json names, in float32 on the CPU.

    With `shape_only`, which needs no more than config.json, it is on the meta device, where tensors have no values.
    """
    path, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    for file in (path,) if shape_only else (path, weights):
        if not file.is_file():
            raise InputError(f"{file} is missing: expected a folder that save_pretrained wrote (safetensors)")
    try:
        config = dict(json.loads(path.read_bytes()))
        name, known = config.get("_class_name"), {kind.CLASS: kind for kind in kinds}
        if name not in known:
            raise InputError(f"_class_name is {name!r}; expected {' or '.join(known)}")
        cls = known[name]
        found = cls.DEFAULTS | {key: value for key, value in config.items() if not key.startswith("_")}
        arguments = cls.from_diffusers(found)
        expected = cls.FIXED | cls.to_diffusers(arguments)
        for key, value in found.items():
            only = expected.get(key)
            repeated = [only] * len(found["block_out_channels"])  # diffusers may write one value once for each level
            if value not in (None, only, repeated) and key not in cls.CARRIED:
                raise InputError(f"{key} = {value!r} is not supported" + (f", only {only!r}" if only else ""))
        with torch.device("meta"):  # no memory for weights that are replaced
            net = cls(**arguments)
    except (InputError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{path}: {error}") from error
    net.carried = {key: config[key] for key in cls.CARRIED if key in config}
    if shape_only:
        return net
    try:
        state = load_file(weights)
        for old, new in OLD_KEYS.items():
            state = {key.replace(old, new): value for key, value in state.items()}
        net.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in state.items()}, assign=True)
    except (ValueError, SafetensorError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 450)
        raise InputError(f"{weights} is damaged, or not of the network in {CONFIG}: {reason}") from error
    return net
