"""Families of codecs: each module says what it offers for a residual, as `FAMILY`."""
