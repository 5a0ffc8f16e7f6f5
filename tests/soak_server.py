"""Starts ``experiments.run`` again and again in processes of its own, without the seconds that imports take.

Reads a JSON list (arguments, file for what the run prints) from each line of its input, forks, and writes the process
id, then the exit status: negative for the signal that ended it. Nothing is forked once JAX has threads.
"""

import json
import os
import sys

from experiments import run, session


def serve() -> None:
    """Returns in the forked processes only."""
    for line in sys.stdin:
        arguments, output = json.loads(line)
        pid = os.fork()
        if pid == 0:
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.argv = ["run.py", *arguments]
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    try:
        serve()
        session.launch(run.define_flags, run.command)
    except KeyboardInterrupt:  # between the fork and the command
        sys.exit(130)
