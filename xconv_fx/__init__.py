"""A torch.compile backend that trains convolutional networks inside a physical memory budget."""

__version__ = "0.1.0"
