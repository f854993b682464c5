"""Work in a child process that asks before each of its operations, and is killed at one of them."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Asks = Callable[[str, tuple[Any, ...]], bool]  # whether the child asks before an audit event with these arguments


def run_until_killed(work: Callable[[], object], asks: Asks, moment: int | None, delay: float = 0) -> tuple[int, bool]:
    """Run `work` in a child and kill it, with all it started, when it asks for the `moment`-th time, or `delay` seconds later.

    How often it asked until then, and whether it was killed.
    """
    questions, answers = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()

            def ask(event: str, arguments: tuple[Any, ...]) -> None:
                if asks(event, arguments):
                    os.write(questions[1], b".")
                    os.read(answers[0], 1)

            sys.addaudithook(ask)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(questions[1])
    os.close(answers[0])
    count = 0
    while os.read(questions[0], 1):
        count += 1
        if count == moment:
            if delay:
                os.write(answers[1], b".")
                time.sleep(delay)
            os.killpg(child, signal.SIGKILL)
            break
        os.write(answers[1], b".")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(questions[0])
    os.close(answers[1])
    assert code in (0, -signal.SIGKILL)
    return count, code != 0
