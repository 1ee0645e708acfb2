"""Clean exits of programs that train for a long time."""

import contextlib
import math
import signal
import sys
import time


@contextlib.contextmanager
def resumable_job():
    """Exit with a short message instead of a traceback if the job fails, is interrupted or receives SIGTERM.

    After a signal, further ones are ignored for ten seconds, so that the child processes are ended too.

    Yields:
        None
    """

    heard = -math.inf

    def interrupt(number, frame):
        nonlocal heard
        if time.monotonic() - heard < 10:
            return
        heard = time.monotonic()
        raise KeyboardInterrupt

    # By default, SIGTERM ends this process but not the training that it started. That training would then write to the
    # same folder as a restarted job. KeyboardInterrupt ends both.
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except (RuntimeError, ImportError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit('interrupted; run the same command again to resume from the newest checkpoint, if there is one')
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
