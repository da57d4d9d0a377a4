"""What a build writes down about itself; the tests append to a copy to have another build."""

from torch import __version__ as _torch

__version__ = "0.2.0+" + _torch.split("+")[0]
torch_version = _torch.split("+")[0]
cuda: str | None = None
cuda_available = False
