"""Give ``build.bazel.remote.execution.v2``, the Remote Execution API, a short name.

The classes are betterproto's; their source, with all comments, is
``protos/proto/build/bazel/remote/execution/v2/remote_execution.proto``.

A member of an enum is an ``int`` to mypy, which a field of the enum's type doesn't take: write
``reapi.DigestFunctionValue(number)`` where one is needed.
"""

from lathe_protos.build.bazel.remote.execution.v2 import *  # noqa: F403 -- this module is nothing but a short name for the generated one
