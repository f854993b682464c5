"""Digits: scikit-learn's scans, their captions, and prompts that no caption contains."""

import io

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_digits

from ldm.data.sources.digits import Digits


def test_digits_are_scikit_learns(tmp_path):
    out, digits = tmp_path / "out", load_digits()
    assert Digits().write(tmp_path, out) == 1797
    table = pd.read_csv(out / "metadata.csv")
    words = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    assert list(table.label) == list(words[digits.target])
    assert all(
        word in text or str(digit) in text for word, digit, text in zip(table.label, digits.target, table.text, strict=True)
    )
    for name, scan in zip(table.file_name, digits.images, strict=True):
        file = io.BytesIO()
        Image.fromarray((scan * 255 / 16).round().astype(np.uint8)).save(file, "PNG")
        assert (out / name).read_bytes() == file.getvalue()
    prompts = pd.read_csv(out / "prompts.csv")
    assert set(prompts.label) == set(words) and not set(prompts.text) & set(table.text)
    assert len(list(out.iterdir())) == 1797 + 2
