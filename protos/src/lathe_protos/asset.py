"""Give ``build.bazel.remote.asset.v1``, the Remote Asset API, a short name.

The classes are betterproto's; their source, with all comments, is
``protos/proto/build/bazel/remote/asset/v1/remote_asset.proto``.
"""

from lathe_protos.build.bazel.remote.asset.v1 import *  # noqa: F403 -- this module is nothing but a short name for the generated one
