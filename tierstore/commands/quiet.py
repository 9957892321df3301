"""Silences the progress bars and warnings of libraries while a command uses them."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what transformers prints, if it is there, and warnings; errors are exceptions and get through."""
    try:
        transformers = importlib.import_module("transformers")  # here, since it takes a second, and only some commands need it
    except ImportError:
        yield
        return
    with quiet(transformers):
        yield


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence progress bars and warnings of an imported transformers, and what others write to stderr meanwhile."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # the GGUF reader's bar listens to no switch
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
