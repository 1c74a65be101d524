"""Give ``build.bazel.remote.logstream.v1``, the Remote LogStream API, a short name.

The classes are betterproto's; their source, with all comments, is
``protos/proto/build/bazel/remote/logstream/v1/remote_logstream.proto``.
"""

from lathe_protos.build.bazel.remote.logstream.v1 import *  # noqa: F403 -- this module is nothing but a short name for the generated one
