"""What kernels take of a device that is here or not: seconds, scratch memory, layouts, precision."""
