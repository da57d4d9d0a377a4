"""What tensors take in this process."""

import gc

import torch


def tensor_bytes() -> int:
    """Of all memory that a tensor in this process holds."""
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.device.type != "meta"
        and t.layout == torch.strided  # others, of tests before, have no storage
    }
    return sum(storages.values())
