"""Entry points: run, sweep, report, logits, generate, replay."""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Of ``python -m experiments.*``, whose imports take seconds: a Ctrl-C in them ends the process without a traceback.
    # ``session.launch`` gives the handler back.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
