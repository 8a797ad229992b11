"""Progress bars, quiet where the output is not a terminal."""

import threading
from collections.abc import Iterable

from tqdm import tqdm

# The lock that tqdm makes by itself fixes the start method of multiprocessing, which the
# official trainer sets later.
tqdm.set_lock(threading.RLock())


def progress(items: Iterable, what: str) -> Iterable:
    """Go through items under a bar."""
    return tqdm(items, desc=what, unit="", leave=False, disable=None)
