"""The two bounds: bandwidth of copies within the device's memory, and from pinned host memory to the device."""

import torch

from benchmarks.gpu.device import copy_bandwidth, device, pinned, pinned_bandwidth
from benchmarks.harness import Report, check_close


def run(*, quick: bool) -> Report:
    """Both, in GB/s."""
    numbers = torch.arange(1000, dtype=torch.float32)
    there = pinned(numbers).to(device(), non_blocking=True)
    check = check_close("numbers copied to the device and back", there.cpu().numpy(), numbers.numpy(), within=0.0)
    rows = [
        {"what": "device copy, bytes read and written", "gb_per_s": _gb(copy_bandwidth(quick=quick))},
        {"what": "pinned host memory to the device", "gb_per_s": _gb(pinned_bandwidth(quick=quick))},
    ]
    return Report(title="The bounds of this GPU", settings={"quick": quick}, checks=[check], tables={"bandwidth": rows})


def _gb(bandwidth: float) -> float:
    return float(f"{bandwidth / 1e9:.4g}")
