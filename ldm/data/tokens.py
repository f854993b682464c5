"""How many tokens captions have for the configured text encoder, and how many captions it would cut."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ldm.base.errors import InputError
from ldm.base.files import content_hash
from ldm.nets.text.encoder import Text, Unavailable

CAPTIONS = 1 << 17  # counted, at most: what takes seconds; a share of them is exact to a tenth of a percent
CHUNK = 1024  # captions in the tokenizer at once: what it returns has hundreds of bytes for each token
SHOWN = 60  # characters of a caption
NOT_HERE = (ImportError, Unavailable)  # raised by `count_tokens` where the encoder is not on this machine


@dataclass(frozen=True)
class TokenCounts:
    """The numbers of tokens, special ones among them, of distinct captions."""

    text: Text
    captions: list[str]
    lengths: np.ndarray  # int (N,): tokens of each of `captions`
    distinct: int  # captions of which these are all, or `CAPTIONS` drawn at random
    most: int | None  # tokens that the encoder can read
    every: int = 1  # images, of which the captions of one were read

    @property
    def truncated(self) -> int:
        """How many would be cut."""
        return int((self.lengths > self.text.max_tokens).sum())

    def embedded_bytes(self, width: int) -> int:
        """How much the embeddings of all captions take in bfloat16, `width` values a token; if some were read, at most."""
        return int(self.lengths.clip(max=self.text.max_tokens).mean() * self.distinct * self.every * width * 2)

    @property
    def _share(self) -> str:
        drawn = f" drawn from {self.distinct:,}" if len(self.captions) < self.distinct else ""
        drawn += f" of one image in {self.every}" if self.every > 1 else ""
        return f"{self.truncated:,} of {len(self.captions):,} distinct captions{drawn}"

    def __str__(self) -> str:
        low, median, high = np.quantile(self.lengths, [0, 0.5, 1])
        spread = f"{low:.0f} to {high:.0f}, median {median:.0f} ({self.text.kind})"
        return f"{spread}; {self._share} are longer than text.max_tokens {self.text.max_tokens} and would be cut"

    def check(self) -> None:
        """Raise an `InputError` if a larger share than `text.max_truncated_fraction` would be cut."""
        allowed, longest = self.text.max_truncated_fraction, int(self.lengths.max())
        if self.truncated <= allowed * len(self.captions):
            return
        found = f"{self._share} would be cut at text.max_tokens {self.text.max_tokens}"
        found += f"; the longest has {longest} tokens ({self.captions[int(self.lengths.argmax())][:SHOWN]!r}…)"
        raised = min(longest, self.most or longest)
        advice = f"raise text.max_tokens, to {raised} for {'all' if raised == longest else 'all that the encoder reads'}"
        raise InputError(f"{found}; {advice}, or text.max_truncated_fraction, now {allowed}, if they may be cut")


def count_tokens(text: Text, captions: Iterable[str], every: int = 1) -> TokenCounts:
    """Count the tokens of distinct captions, of which there is at least one; raises one of `NOT_HERE`, or `InputError`."""
    count, most = text.counter()
    distinct = sorted(set(captions))
    counted = distinct
    if len(distinct) > CAPTIONS:  # as content decides, not the order of files, the same ones are drawn again
        counted = sorted(distinct, key=lambda caption: content_hash(caption.encode()))[:CAPTIONS]
    chunks = (counted[start : start + CHUNK] for start in range(0, len(counted), CHUNK))
    lengths = np.array([length for chunk in chunks for length in count(chunk)])
    return TokenCounts(text, counted, lengths, len(distinct), most, every)
