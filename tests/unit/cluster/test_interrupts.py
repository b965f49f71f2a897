"""The first signal asks, another one ends at once; what SLURM and srun both send is one."""

import signal

from retort.cluster.interrupts import Interrupts


def test_another_signal_ends_at_once_but_not_the_same_sigterm_by_another_way() -> None:
    taken: list[tuple[str, int]] = []
    now = 0.0

    def raise_signals(*numbers: int, after_s: float) -> list[tuple[str, int]]:
        nonlocal now
        taken.clear()
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with Interrupts(
            lambda number: taken.append(("first", number)),
            again=lambda number: taken.append(("again", number)),
            clock=lambda: now,
        ) as interrupts:
            for number in numbers:
                signal.raise_signal(number)
                now += after_s
        assert interrupts.number == numbers[0]
        assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return taken

    ctrl_c, term = int(signal.SIGINT), int(signal.SIGTERM)
    assert raise_signals(ctrl_c, ctrl_c, after_s=0) == [("first", ctrl_c), ("again", ctrl_c)]
    assert raise_signals(term, ctrl_c, after_s=0) == [("first", term), ("again", ctrl_c)]
    assert raise_signals(term, term, after_s=0.5) == [("first", term)]
    assert raise_signals(term, term, after_s=5) == [("first", term), ("again", term)]


def test_a_signal_that_was_ignored_is_ignored_still() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts(lambda number: None) as interrupts:
            signal.raise_signal(signal.SIGINT)
        assert interrupts.number == 0
    finally:
        signal.signal(signal.SIGINT, before)
