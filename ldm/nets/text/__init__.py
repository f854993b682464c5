"""The text encoders that `text` can name, a line each."""

from ldm.nets.text.minilm import MiniLM as MiniLM
from ldm.nets.text.transformer import Transformer as Transformer
