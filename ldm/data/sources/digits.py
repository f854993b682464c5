"""scikit-learn's handwritten digits (Alpaydin & Kaynak 1998, UCI "Optical Recognition of Handwritten Digits")."""

from pathlib import Path
from typing import Literal

from ldm.base.files import replacing
from ldm.data.sources.source import Source

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = (
    "a handwritten {word}",
    "a handwritten {digit}",
    "the digit {digit}",
    "the digit {word}",
    "a scan of the numeral {word}",
    "{digit}, written by hand",
)
UNSEEN = ("the number {digit}", "an image showing the numeral {word}", "someone wrote {word} on paper", "a picture of a {digit}")


class Digits(Source):
    """Handwritten digits, which scikit-learn's wheel contains: no download."""

    kind: Literal["digits"] = "digits"

    def write(self, root: Path, out: Path) -> int:
        """Write PNGs, `metadata.csv` (`file_name,text,label`) and `prompts.csv` (`text,label`)."""
        import numpy as np
        import pandas as pd
        from PIL import Image
        from sklearn.datasets import load_digits

        digits = load_digits()
        rows = []
        with replacing(out) as folder:
            for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
                name = f"{number:04d}.png"
                Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8)).save(folder / name)
                caption = CAPTIONS[number % len(CAPTIONS)].format(word=WORDS[label], digit=label)
                rows.append({"file_name": name, "text": caption, "label": WORDS[label]})
            pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
            prompts = [{"text": text.format(word=w, digit=d), "label": w} for d, w in enumerate(WORDS) for text in UNSEEN]
            pd.DataFrame(prompts).to_csv(folder / "prompts.csv", index=False)
        return len(rows)
