"""Progress: a bar on a terminal, a line every ten seconds where the output is a file or a pipe."""

import sys
from typing import Any

from tqdm import tqdm

EVERY = 10  # seconds between two lines


class _Lines:
    """A stream for tqdm that makes a line of what would be drawn over the last one."""

    def write(self, text: str) -> None:
        """Prints what is not empty."""
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        """Passed on."""
        sys.stderr.flush()


def make_bar(total: int, desc: str, *, initial: int = 0, progress: bool = True, leave: bool = False) -> "tqdm[Any]":
    """A bar of `total` steps on stderr; in a file, silent about what takes less than ten seconds."""
    options: dict[str, Any] = {}
    if not sys.stderr.isatty():
        form = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"
        leave = False
        options = {"file": _Lines(), "mininterval": EVERY, "miniters": 1, "delay": EVERY, "bar_format": form}
    return tqdm(total=total, desc=desc, initial=initial, leave=leave, disable=not progress, **options)
