"""Lets a test fail where the host waits for the GPU."""

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raises RuntimeError at the operation that waits, as far as PyTorch notices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that it does not notice all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
