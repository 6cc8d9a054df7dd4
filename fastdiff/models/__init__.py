"""Networks that fastdiff trains and loads itself."""

from .unet import UNet, UNetConfig

__all__ = ["UNet", "UNetConfig"]
