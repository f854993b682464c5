"""The gate against scipy's paired t-test, and simulation under the null."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ldm.evaluation.gate import decide

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def reseed() -> None:
    """Each test draws the same numbers whichever tests run before it."""
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state


def nats(values: Any, keys: list[str] | None = None) -> Any:
    return pd.Series(values, index=keys or [f"{i:03}" for i in range(len(values))], dtype=float)


def pair(n: int, gain: float, spread: float = 5.0) -> tuple[Any, Any]:
    """Challenger and champion whose images differ far more than the models do."""
    champion = nats(RANDOM.normal(-1500, 200, n))
    return champion + RANDOM.normal(gain, spread, n), champion


@pytest.mark.parametrize(("n", "gain", "level"), [(178, 2.0, 0.005), (178, -2.0, 0.005), (5, 3.0, 0.05), (2, 1.0, 0.1)])
def test_limit_and_verdict_equal_scipys_paired_test(n: int, gain: float, level: float) -> None:
    challenger, champion = pair(n, gain)
    decision = decide(challenger, champion, level)
    peer = stats.ttest_rel(challenger, champion, alternative="greater")
    assert decision.lower == pytest.approx(peer.confidence_interval(1 - level).low)
    assert decision.promote == (peer.pvalue < level)
    assert (decision.n, decision.level) == (n, level)
    assert decision.mean == pytest.approx((challenger - champion).mean())
    assert decision.se == pytest.approx(stats.sem(challenger - champion))


def test_order_of_keys_does_not_matter() -> None:
    challenger, champion = pair(50, 3.0)
    shuffled = champion.iloc[RANDOM.permutation(50)]
    decision, peer = decide(challenger, shuffled), decide(challenger, champion)
    assert (decision.se, decision.lower) == pytest.approx((peer.se, peer.lower))


def test_chance_promotions_are_as_rare_as_the_level_says() -> None:
    """60,000 nights without a real improvement: the limit, vectorised, is the one `decide` computes."""
    nights, n, level = 60_000, 40, 0.005
    gains = RANDOM.normal(0, 5, (nights, n))
    lower = gains.mean(axis=1) - stats.t.ppf(1 - level, n - 1) * gains.std(axis=1, ddof=1) / math.sqrt(n)
    for row, expected in zip(gains[:20], lower[:20], strict=True):
        assert decide(nats(row - 1500), nats(np.full(n, -1500.0)), level).lower == pytest.approx(expected)
    promoted = int((lower > 0).sum())
    assert stats.binomtest(promoted, nights, level).pvalue > 0.001


def test_decide_itself_rarely_promotes_the_same_model_and_mostly_a_better_one() -> None:
    same = sum(decide(*pair(60, 0.0), 0.05).promote for _ in range(800))
    assert stats.binomtest(same, 800, 0.05).pvalue > 0.001
    assert sum(decide(*pair(60, 3.0)).promote for _ in range(100)) > 90


def test_a_better_model_on_average_is_not_enough() -> None:
    gains = np.zeros(100)
    gains[0] = 500.0  # one lucky image: mean +5 nats
    decision = decide(nats(gains - 1500), nats(np.full(100, -1500.0)))
    assert decision.mean == pytest.approx(5)
    assert not decision.promote


def test_first_model_is_promoted() -> None:
    decision = decide(nats([-1500.0, -1400.0]), None)
    assert decision.promote
    assert decision.reason == "no champion yet"
    assert decision.n == 2
    assert math.isnan(decision.mean)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_bound_that_is_not_finite_never_becomes_champion(bad: float) -> None:
    broken, sound = nats([-1500.0, bad]), nats([-1500.0, -1500.0])
    for challenger, champion in ((broken, None), (broken, sound), (sound, broken)):
        decision = decide(challenger, champion)
        assert not decision.promote
        assert "'001'" in decision.reason


def test_differing_keys_name_the_first() -> None:
    with pytest.raises(ValueError, match=r"image 'b' has a value of the challenger but none of the champion \(2 such\)"):
        decide(nats([-1, -2, -3], ["c", "b", "a"]), nats([-1], ["a"]))
    with pytest.raises(ValueError, match="image 'z' has a value of the champion but none of the challenger"):
        decide(nats([-1], ["a"]), nats([-1, -2], ["z", "a"]))
    with pytest.raises(ValueError, match="champion has image 'a' more than once"):
        decide(nats([-1, -2], ["a", "b"]), nats([-1, -2, -3], ["a", "a", "b"]))


def test_code_lengths_in_place_of_log_likelihoods_are_refused() -> None:
    challenger, champion = pair(20, 5.0)
    with pytest.raises(ValueError, match="code lengths"):
        decide(-challenger, -champion)


def test_too_few_images_and_no_variance() -> None:
    assert not decide(nats([-1.0]), nats([-2.0])).promote
    assert "at least 2" in decide(nats([-1.0]), nats([-2.0])).reason
    assert not decide(nats([]), nats([])).promote
    assert not decide(nats([]), None).promote
    constant = nats([-4.0, -5.0, -6.0])
    assert not decide(constant, constant).promote  # the same model again
    assert decide(constant, constant).lower == 0
    assert decide(constant + 1, constant).promote
    assert not decide(constant - 1, constant).promote


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0, -0.1])
def test_levels_that_mean_nothing_are_refused(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        decide(nats([-1.0, -2.0]), nats([-1.0, -2.0]), level)
