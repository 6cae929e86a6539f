"""What the programs of this folder share: importable scripts, Ctrl-C, processes."""

import multiprocessing
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def report_error(kind: type[BaseException], error: BaseException, trace) -> None:
    """Python's traceback for every error but Ctrl-C, after which there is nothing to trace."""
    if kind is KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = report_error


def processes(workers: int, **options) -> ProcessPoolExecutor:
    """New processes, each with its own torch; Ctrl-C ends them without tracebacks of their own."""
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
