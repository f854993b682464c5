"""What `data.source` can name: each source is a class in a file of its own, imported here."""

from ldm.data.sources.digits import Digits as Digits
from ldm.data.sources.huggingface import HuggingFace as HuggingFace
