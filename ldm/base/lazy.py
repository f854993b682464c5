"""Imports that wait until a name is used: a stage depends only on the modules that it uses, and `ldm --help` is quick."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any


def exports(package: str, names: dict[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` for `package`, whose public names live in its submodules, `{submodule: "Name other"}`."""
    homes = {name: module for module, found in names.items() for name in found.split()}

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{homes[name]}")
        return module if homes[name] == name else getattr(module, name)

    return __getattr__, sorted(homes)


class _Module(ModuleType):
    """A module that is imported when one of its names is used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
else:
    torch = _Module("torch")
    Tensor = Any  # for annotations
