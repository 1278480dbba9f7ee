"""Ctrl-C, SIGTERM and a closed terminal: a program ends in one line, with no file half-written."""

import contextlib
import os
import signal
import sys
import threading


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end.

    Attributes:
        number: of the signal. The message is the line that the user sees.
    """

    def __init__(self, number, message="interrupted: no file was left half-written"):
        super().__init__(message)
        self.number = number


class SignalHandler:
    """Ends the program at once, or calls ``deferred`` while that is set.

    Training and writing set it, because they must reach the end of a step or block first.
    """

    deferred = None

    @classmethod
    def handle(cls, number, frame):
        """Raise :class:`Stopped`, so that ``finally`` clauses remove temporary files."""
        if cls.deferred is None:
            raise Stopped(number)
        cls.deferred(number)


def current_handlers():
    """SIGINT, SIGTERM and SIGHUP -> handler, less those that the caller's shell ignores (nohup)."""
    numbers = [getattr(signal, n, None) for n in ("SIGINT", "SIGTERM", "SIGHUP")]
    handlers = {n: signal.getsignal(n) for n in numbers if n is not None}
    return {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}


def end_at_signals():
    """End the process in one line at a signal, outside of :func:`catch_signals`.

    An exception would not do: raised within an import, it may end as another one, or as none.
    """

    def end(number, frame):
        name = signal.Signals(number).name
        with contextlib.suppress(Exception):  # the terminal may be gone, or print be under way
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"stopped by {name}: no file was left half-written\n".encode())
        os._exit(128 + number)

    for number in current_handlers():
        signal.signal(number, end)


@contextlib.contextmanager
def catch_signals():
    """Route SIGINT, SIGTERM and SIGHUP to :class:`SignalHandler`; restore the old handlers after.

    Signals that the caller's shell ignores (nohup) stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    handlers = current_handlers()
    try:
        for number in handlers:
            signal.signal(number, SignalHandler.handle)
        yield
    finally:
        SignalHandler.deferred = None
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def defer_signals():
    """Collect signals in a list instead of acting on them; raise the first one at the end.

    Yields:
        list of signal numbers, so that a loop can stop between two of its steps.
    """
    received = []
    SignalHandler.deferred = received.append
    try:
        yield received
    finally:
        SignalHandler.deferred = None
    if received:
        raise Stopped(received[0])
