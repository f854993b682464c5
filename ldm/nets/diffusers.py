"""Networks in diffusers' folder format: `config.json` and `diffusion_pytorch_model.safetensors`."""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.base.errors import InputError
from ldm.base.hashing import content_hash, file_hash
from ldm.nets.blocks import Block

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
OLD_KEYS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def network_hash(folder: Path) -> str:
    """Identity of a saved network: of its configuration and weights, not of what else is in the folder."""
    return content_hash("".join(file_hash(folder / name) for name in (CONFIG, WEIGHTS)).encode())


def registered(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor whose arguments are kept in `config`, as `save_pretrained` writes them."""

    @functools.wraps(init)
    def constructor(self: "Pretrained", *args: Any, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        arguments = inspect.signature(init).bind(self, *args, **kwargs)
        arguments.apply_defaults()
        given = {name: value for name, value in arguments.arguments.items() if name != "self"}
        self.config = {name: list(v) if isinstance(v, list | tuple) else v for name, v in given.items()}
        self.carried = {}
        init(self, *args, **kwargs)

    return constructor


class Pretrained(nn.Module):
    """A network kept as diffusers keeps it: `config.json` and `diffusion_pytorch_model.safetensors` in one folder."""

    CLASS: ClassVar[str]  # diffusers' name of the network
    DEFAULTS: ClassVar[dict[str, Any]]  # diffusers' defaults of the configuration keys that are read
    FIXED: ClassVar[dict[str, Any]]  # configuration keys of which one value is supported; any other key must be null
    CARRIED: ClassVar[tuple[str, ...]]  # configuration keys that change no output, written back as they were read

    config: dict[str, Any]  # the constructor's arguments
    carried: dict[str, Any]

    def blocks(self) -> list[Block]:
        """The parts that memory is saved by: sharded one by one, or computed twice."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Let training keep only the inputs of the blocks and compute the rest twice (Chen et al. 2016)."""
        for block in self.blocks():
            block.recompute = on

    def place(self, device: torch.device | str) -> Self:
        """Move to a device, in channels-last layout, which convolutions run faster in."""
        return self.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def to_diffusers(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments as diffusers' configuration."""
        raise NotImplementedError

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> dict[str, Any]:
        """diffusers' configuration, nothing missing, as the constructor's arguments."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder; equal networks give equal bytes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": self.CLASS, **self.to_diffusers(self.config), **self.carried}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        state = {key: value.cpu().contiguous() for key, value in sorted(self.state_dict().items())}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The network of a folder that this class or diffusers wrote, in float32 on the CPU."""
        config, weights = read_config(folder), _present(folder, WEIGHTS)
        try:
            state = {_new_key(key): value for key, value in load_file(weights).items()}
        except (ValueError, SafetensorError) as error:
            raise InputError(f"{weights} is damaged ({error}); fetch it again") from error
        net = cls._skeleton(Path(folder) / CONFIG, config)
        _check_state(weights, net.state_dict(), state)
        net.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in state.items()}, assign=True)
        return net

    @classmethod
    def _skeleton(cls, file: Path, config: dict[str, Any]) -> Self:
        """The network that `config` describes, without memory for its weights."""
        found = cls.DEFAULTS | {key: value for key, value in config.items() if not key.startswith("_")}
        try:
            arguments = cls.from_diffusers(found)
            expected = cls.FIXED | cls.to_diffusers(arguments) | {"_class_name": cls.CLASS}
            for key, value in {**found, "_class_name": config.get("_class_name")}.items():
                only = expected.get(key)
                repeated = [only] * len(found["block_out_channels"])  # how diffusers may write one value for all levels
                if value not in (None, only, repeated) and key not in cls.CARRIED:
                    raise InputError(f"{key} = {value!r} is not supported, only {only!r}")
            with torch.device("meta"):
                net = cls(**arguments)
        except (InputError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise InputError(f"{file}: {error}") from error
        net.carried = {key: config[key] for key in cls.CARRIED if key in config}
        return net


def _present(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{path} is missing: expected a folder that save_pretrained wrote (safetensors)")
    return path


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a network's folder in diffusers' format."""
    file = _present(folder, CONFIG)
    try:
        return dict(json.loads(file.read_bytes()))
    except (TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}); fetch it again") from error


def _new_key(key: str) -> str:
    """Published autoencoders still carry the names that diffusers gave attention weights before version 0.12."""
    for old, new in OLD_KEYS.items():
        key = key.replace(old, new)
    return key


def _check_state(file: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for what, keys in (("misses", expected.keys() - found.keys()), ("has unexpected", found.keys() - expected.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"{file} {what} key {min(keys)}{more}: these weights are not of the network in {CONFIG}")
    for key, value in expected.items():
        if value.shape != found[key].shape:
            shapes = f"{tuple(found[key].shape)}, expected {tuple(value.shape)}"
            raise InputError(f"{file}: {key} has shape {shapes}: these weights are not of the network in {CONFIG}")
