"""Zstandard streams: their framing, bounded decoding, encoding. Without I/O."""
