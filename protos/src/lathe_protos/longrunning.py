"""Give ``google.longrunning``, what Execute answers with, a short name.

The classes are betterproto's; their source, with all comments, is
``protos/proto/google/longrunning/operations.proto``.
"""

from lathe_protos.google.longrunning import *  # noqa: F403 -- this module is nothing but a short name for the generated one
