"""The cache by HTTP/1.1, for clients that do not speak gRPC: Bazel's ``--remote_cache=http://``, ccache and others."""
