"""Give ``grpc.health.v1``, the gRPC health service, a short name.

The classes are betterproto's; their source, with all comments, is
``protos/proto/grpc/health/v1/health.proto``.
"""

from lathe_protos.grpc.health.v1 import *  # noqa: F403 -- this module is nothing but a short name for the generated one
