"""Half precision: the autocast that training steps run under."""

import contextlib

import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from race.device import AUTOCAST


def autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager:
    """torch's autocast, or nothing for float32. It keeps its casts of weights: ALBERT's shared layers once a step."""
    half = AUTOCAST.get(precision)
    return contextlib.nullcontext() if half is None else torch.autocast(device_type, half, cache_enabled=True)


class Autocast(MixedPrecision):
    """Lightning's plugin, which forgets the casts of weights at once; here they last until the end of the step."""

    def autocast_context_manager(self) -> contextlib.AbstractContextManager:
        """Around every training and validation step."""
        return autocast(self.device, self.precision)


Autocast.__qualname__ = MixedPrecision.__qualname__  # under this name Lightning keeps the state of the loss scaler
