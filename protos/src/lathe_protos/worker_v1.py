"""Give ``lathe.worker.v1``, the protocol between scheduler and workers, a short name.

The classes are betterproto's; their source, with all comments, is
``protos/proto/lathe/worker/v1/worker.proto``.
"""

from lathe_protos.lathe.worker.v1 import *  # noqa: F403 -- this module is nothing but a short name for the generated one
