"""Files that stay open between reads: opening one takes several system calls, each of which may wait for a busy machine."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path

from tierstore.open_file import OpenFile

_SHARE = 8  # of the files that a process may open, one in so many; each takes two descriptors
_MOST = 1024


class OpenFiles:
    """Open files by path, for several threads. When there are as many as there may be, no more are kept: reads in a loop
    over more files than that would otherwise find none of them open. `opener` opens one.
    """

    def __init__(self, opener: Callable[[Path], OpenFile]) -> None:
        self._opener = opener
        self._lock = threading.Lock()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = _MOST if limit == resource.RLIM_INFINITY else min(_MOST, limit // _SHARE)
        self._files: dict[Path, OpenFile] = {}

    def borrow(self, path: Path) -> tuple[OpenFile, bool]:
        """Return the file, open, for the caller to close once; and whether it also stays open here."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._opener(path)
                if len(self._files) >= self._most:
                    return file, False
                self._files[path] = file
            file.share()
            return file, True

    def forget(self, path: Path) -> None:
        """Close the file as far as this collection is concerned: it was replaced or deleted."""
        with self._lock:
            file = self._files.pop(path, None)
        if file is not None:
            file.close()

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            files, self._files = self._files, {}
        for file in files.values():
            file.close()
