"""Measures the peak memory of a block of code."""

from __future__ import annotations

import threading
from typing import ClassVar

import psutil
import torch

_SAMPLE_SECONDS = 0.02


class PeakMemory:
    """Measures the peak memory of this process between entry and exit of a `with` block.

    On CUDA this is the largest number of bytes that torch had allocated at once, summed over all visible
    devices; it is exact. Blocks may be nested: the outer block sees the peaks of the inner ones.

    Elsewhere it is the resident set size (RSS) of the process, sampled every 20 ms and at both ends, so a
    shorter spike can be missed. RSS covers everything in the process: Python, libraries (some 400 MiB for
    torch alone), memory of earlier models that the allocator has not given back, files mapped and read.

    Args:
        device: Where the work runs. For None or anything but CUDA, RSS is measured.

    Attributes:
        kind: "cuda" or "rss".
        peak_bytes: The absolute peak.
        rise_bytes: The peak minus the bytes in use at entry, >= 0.
    """

    _open_on_cuda: ClassVar[list[PeakMemory]] = []

    def __init__(self, device: torch.device | str | None = None) -> None:
        on_cuda = device is not None and torch.device(device).type == "cuda"
        self.kind = "cuda" if on_cuda else "rss"
        self.peak_bytes = 0
        self.rise_bytes = 0
        self._at_entry = 0
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None
        self._process = psutil.Process()

    def __enter__(self) -> PeakMemory:
        if self.kind == "cuda":
            self._enter_cuda()
        else:
            self._at_entry = self.peak_bytes = self._process.memory_info().rss
            self._sampler = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._sampler is not None:
            self._stop.set()
            self._sampler.join()
            self._note(self._process.memory_info().rss)
        else:
            PeakMemory._open_on_cuda.remove(self)
            self._note(_cuda_peak())

    def _enter_cuda(self) -> None:
        """Resets torch's peak, after noting the peak so far in the blocks around this one."""
        for outer in PeakMemory._open_on_cuda:
            outer._note(_cuda_peak())
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
        self._at_entry = self.peak_bytes = _cuda_peak()
        PeakMemory._open_on_cuda.append(self)

    def _sample(self) -> None:
        """Runs in the sampling thread until told to stop."""
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._note(self._process.memory_info().rss)

    def _note(self, in_use_bytes: int) -> None:
        """Updates the peak with one reading."""
        self.peak_bytes = max(self.peak_bytes, in_use_bytes)
        self.rise_bytes = self.peak_bytes - self._at_entry


def _cuda_peak() -> int:
    """Returns the peak since the last reset, summed over the devices."""
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.max_memory_allocated(index) for index in devices)
