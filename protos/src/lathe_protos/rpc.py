"""Give ``google.rpc``, Status and the error details that travel in it, a short name.

The classes are betterproto's; their source, with all comments, is
``protos/proto/google/rpc/``.
"""

from lathe_protos.google.rpc import *  # noqa: F403 -- this module is nothing but a short name for the generated one
