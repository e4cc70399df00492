"""Seconds that parts of a round take on their device, without making the host wait for them."""

import time

import torch


class Clock:
    """Marks on a CPU are moments; on an accelerator, events among the work in flight."""

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def seconds(self, start, end) -> float:
        """Between two marks; waits for the later one."""
        if self.device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3
