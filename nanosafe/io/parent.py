"""A process that must not outlive the one that started it."""

import os
import threading
import time

SECONDS = 1.0  # between two looks at whether the parent still lives


def end_with_parent() -> None:
    """End this process soon after its parent has ended.

    Ranks wait for one that died until torchrun, their parent, ends them; without torchrun they would wait for hours.
    """
    parent = os.getppid()

    def check() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS)
        os._exit(1)

    threading.Thread(target=check, daemon=True).start()
