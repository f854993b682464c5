"""A model's sampling defaults with some of them changed, as calls and served models change them."""

from typing import Any

import pytest

from ldm.base.errors import InputError
from ldm.diffusion.options import changed_sampling
from ldm.diffusion.samplers.ddim import Ddim, Euler
from ldm.diffusion.samplers.heun import Heun
from ldm.diffusion.samplers.sampler import Sampler

DEFAULTS: dict[str, Any] = {
    "sampler": {"kind": "ddim", "eta": 0.5},
    "schedule": "karras",
    "steps": 16,
    "guidance": 1.3,
    "guidance_interval": None,
    "guidance_rescale": 0.0,
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ddim", Ddim(eta=0.5)),
        ("euler", Euler()),
        ({"kind": "heun", "churn": 3}, Heun(churn=3.0)),
        (Heun(churn=2.0), Heun(churn=2.0)),
    ],
)
def test_a_sampler_is_a_kind_a_dictionary_or_a_sampler(given: Any, expected: Sampler) -> None:
    found = changed_sampling(DEFAULTS, {"sampler": given, "steps": 4})
    assert found.sampler == expected
    assert (found.steps, found.guidance) == (4, 1.3)


def test_none_is_a_value():
    assert changed_sampling(DEFAULTS | {"guidance_interval": [0.1, 5.0]}, {"guidance_interval": None}).guidance_interval is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "schedule: found 'linear'; Input should be 'karras', 'exponential' or 'uniform'"),
        ({"steps": 0}, "steps: found 0"),
        ({"sampler": "plms"}, "sampler.kind: found 'plms'; known are 'ddim', 'ddpm', 'euler', 'dpmpp_2m', 'heun'"),
        ({"sampler": {"kind": "ddim", "churn": 3}}, "unknown key sampler.churn: known here: kind, eta"),
        ({"churn": 3}, "unknown key churn: known here: sampler, schedule, steps"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance_interval is [2.0, 1.0]; give the lower noise level first"),
    ],
)
def test_what_the_schema_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        changed_sampling(DEFAULTS, changes)
    assert message in str(refused.value)
