"""How a run ends before its time: by a signal, or by what it cannot go on from."""

import logging
import signal
from typing import Any, NoReturn


class Stopped(Exception):
    """SIGINT, SIGTERM or SIGHUP arrived, args[0]; the training state is that of a whole step."""


class RunFailed(Exception):
    """The run cannot go on; the text is one line. Of several processes all know it."""


class OutOfMemory(RunFailed):
    """Not even one image fits; of several processes this one alone may know it."""


class StopSignals:
    """SIGINT (NNI, Ctrl-C), SIGTERM (schedulers) and SIGHUP (a terminal that closes) are noted here and acted on
    between two steps.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the last signal, 0 for none
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup
                signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: Any) -> None:
        self.received = signum


def end_by_signal(signum: int) -> NoReturn:
    """End as the signal would have: shells see status 130, 143 or 129, NNI shows the trial as canceled."""
    logging.shutdown()
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)
