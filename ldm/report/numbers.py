"""Numbers as people read them."""

import math
from typing import Any


def shown(value: Any) -> tuple[str, str]:
    """Number and unit of an `ldm.evaluation.value.Value`: ("2.8857 ± 0.0098", "bits/dim"), ("99.0%", "").

    Two significant digits of the standard error, four of a number without one; no unit that the title says already.
    """
    number, error, unit = value.value, value.error, "" if value.unit in ("share", value.title) else value.unit
    if not math.isfinite(number):
        return "–", ""
    if value.unit == "share":
        return f"{number:.1%}", unit
    if error and math.isfinite(error):
        decimals = max(0, 1 - math.floor(math.log10(error)))
        return f"{number:,.{decimals}f} ± {error:,.{decimals}f}", unit
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}", unit
