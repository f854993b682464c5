"""A model's sampling defaults, and calls that change some of them."""

from typing import Any

from pydantic import ValidationError

from ldm.base.errors import InputError
from ldm.config import Sampling, explained

# defaults for models registered before these options existed
FORMERLY = {"schedule": "karras", "eta": 0.0, "churn": 0.0, "guidance_interval": None, "guidance_rescale": 0.0}


def changed_sampling(defaults: dict[str, Any], changes: dict[str, Any]) -> Sampling:
    """A model's sampling defaults with some of them changed; a change that is None, or to the default itself, is none."""
    known = {**FORMERLY, **defaults}
    given = {name: value for name, value in changes.items() if value is not None and value != known.get(name)}
    others = {"eta": 0.0, "churn": 0.0} if "sampler" in given else {}  # the defaults are another sampler's
    try:
        return Sampling.model_validate({**known, **others, **given})
    except ValidationError as error:
        raise InputError(explained(error, "sampling")) from None
