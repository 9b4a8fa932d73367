"""The device that a worker computes on."""

import torch

from scission.common.config import ModelOptions
from scission.common.errors import ConfigError


def open_device(options: ModelOptions) -> torch.device:
    """The device that the options mean; `auto` is a GPU (CUDA or HIP) where there is one.

    Sets torch's number of threads too. Raises ConfigError when a GPU is asked for and none is seen.
    """
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise ConfigError("device cuda is asked for, but torch sees no GPU; use --device cpu")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    is_gpu = options.device == "cuda" or (options.device == "auto" and has_gpu)
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")
