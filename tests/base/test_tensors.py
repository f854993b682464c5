"""Files of tensors: safetensors' own content, readable as other files are."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.base.tensors import save_tensors


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_the_users_mask_decides_who_may_read(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        for _ in range(2):  # also where the file is there
            save_tensors({"a": torch.arange(3)}, tmp_path / "x.safetensors", {"about": "x"})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]
