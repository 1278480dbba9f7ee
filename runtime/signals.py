"""Ctrl-C, SIGTERM and a closed terminal: nothing is left half-written."""

import contextlib
import signal
import threading


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end; carries its number and the line that the user sees."""

    def __init__(self, number, message="interrupted: no file was left half-written"):
        super().__init__(message)
        self.number = number


class Interruption:
    """What a signal does: it ends the program at once, or calls ``later`` while that is set."""

    later = None

    @classmethod
    def handle(cls, number, frame):
        """Raise :class:`Stopped`, which lets ``finally`` clauses remove temporary files."""
        if cls.later is None:
            raise Stopped(number)
        cls.later(number)


@contextlib.contextmanager
def catch_signals():
    """Let Ctrl-C, SIGTERM and a closed terminal go to :class:`Interruption`, then as before.

    Signals that the caller's shell has set to be ignored (nohup) stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    numbers = [getattr(signal, n, None) for n in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {n: signal.getsignal(n) for n in numbers if n is not None}
    before = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, Interruption.handle)
        yield
    finally:
        Interruption.later = None
        for number, old in before.items():
            signal.signal(number, old)
