"""Give ``build.bazel.semver``, the API versions in ServerCapabilities, a short name.

The classes are betterproto's; their source, with all comments, is
``protos/proto/build/bazel/semver/semver.proto``.
"""

from lathe_protos.build.bazel.semver import *  # noqa: F403 -- this module is nothing but a short name for the generated one
