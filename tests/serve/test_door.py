"""Whoever waits for an engine gets it after the step that runs, not when a loop of steps ends."""

from __future__ import annotations

import threading
import time

import pytest

from mogul.serve.door import Door


def test_its_holder_may_enter_again_and_an_error_opens_it() -> None:
    door = Door()
    with pytest.raises(KeyError), door, door:
        raise KeyError
    thread = threading.Thread(target=door.__enter__)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "it was left open"


def test_one_thread_at_a_time() -> None:
    door, inside, most = Door(), [0], [0]

    def enter() -> None:
        for _ in range(200):
            with door:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                inside[0] -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_who_waits_is_next(tiny) -> None:
    """A thread steps without a pause: every call of another one waits for two steps at most."""
    engine = tiny.engine("llama")
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.is_set():
            engine.step()

    run, num_steps = engine.steps.launch, [0]

    def slowly(plan):
        num_steps[0] += 1
        time.sleep(0.002)  # as a device does, it lets other threads run
        return run(plan)

    engine.steps.launch = slowly
    engine.generate([[1, 2]])
    thread = threading.Thread(target=loop)
    engine.add([1, 2, 3])
    thread.start()
    waited = []
    for _ in range(20):
        before = num_steps[0]
        engine.abort(engine.add([4, 5]))
        waited.append(num_steps[0] - before)
        time.sleep(0.003)
        if not engine.stats.num_running:
            engine.add([1, 2, 3])
    is_over.set()
    thread.join()
    assert max(waited) <= 6, f"steps that three calls waited for: {waited}"
