"""Which threads give way: decoding images is long work that a core may do any time, refusing and answering is not."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

_NICER = 8
"""So much that refusals do not wait for large images, and no more: with 10, one core decodes images more slowly than rows ask for them, and few are decoded together."""


def yield_to_others() -> None:
    """Have this thread run after others of the machine that have something to do; on Linux, where threads have priorities of their own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):  # where that is not allowed, it runs as all do
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER)
