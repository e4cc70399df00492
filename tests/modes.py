"""Torch's modes of this thread, which a test, and an interruption, must leave as they were."""

import torch


def left_open() -> list[str]:
    """Which of them are: none at all, at a test's end."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    found = {
        "gradients are off": not torch.is_grad_enabled(),
        "inference mode is on": torch.is_inference_mode_enabled(),
        "tensors' own dispatch is off": excluded.has(torch._C.DispatchKey.Python),
        "autograd is off": excluded.has(torch._C.DispatchKey.AutogradCPU),
        "fake tensors are on": torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None,
    }
    return [name for name, is_so in found.items() if is_so]
