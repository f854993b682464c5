"""A pool of processes ends with an error, never in a wait, also while it is sending large results."""

import multiprocessing

import pytest

from ldm.base.errors import InputError
from ldm.data.parallel import mapped

LARGE = 3_000_000  # bytes: many times what a pipe takes at once


def test_what_is_raised_while_results_are_sent_is_raised() -> None:
    before = set(multiprocessing.active_children())  # of other tests
    with (
        pytest.raises(ValueError, match="negative count"),
        mapped(bytes, [LARGE] * 40 + [-1] + [LARGE] * 40, 2) as results,
    ):
        for _ in results:
            pass
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("number", [0, 1])  # one of them is sending, the other waits for its turn
def test_a_process_killed_while_results_are_sent_is_an_error(number: int) -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(InputError, match="a worker process was killed"), mapped(bytes, [LARGE] * 100, 2) as results:
        for done, _ in enumerate(results):
            if done == 3:
                sorted(set(multiprocessing.active_children()) - before, key=lambda child: child.name)[number].kill()
    assert set(multiprocessing.active_children()) <= before
