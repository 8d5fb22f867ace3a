"""autoplace: places PyTorch models on the devices you have, for less time and less energy."""

__version__ = "0.1.0"
