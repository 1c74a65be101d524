"""Adapters behind the ports ``BlobStore`` and ``ActionResultStore``: LMDB for service, memory as the model in tests."""
