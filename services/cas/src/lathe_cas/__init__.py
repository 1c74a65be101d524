"""Content addressable storage and action cache, kept in LMDB and served over gRPC."""

__version__ = "0.1.0"
