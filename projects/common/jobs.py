"""Programs that train for a long time: how they end."""

import contextlib
import signal
import sys


@contextlib.contextmanager
def resumable_job():
    """Exit with a short message instead of a traceback when the job fails, is interrupted or receives SIGTERM."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    # By default, SIGTERM ends this process only: its training would go on and write into the same folder as the next
    # start. KeyboardInterrupt ends the training too.
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (RuntimeError, ImportError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit('interrupted; run the same command again to resume from the newest checkpoint, if there is one')
    finally:
        signal.signal(signal.SIGTERM, previous)
