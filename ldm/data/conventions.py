"""Where captions come from, as `data.captions` says; `captions.py` reads them. Of its own, as settings import no table reader."""

from typing import Literal

Convention = Literal["auto", "tables", "text files", "folder names", "none"]
