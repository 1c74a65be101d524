"""Give ``google.bytestream``, how single blobs are read and written, a short name.

The classes are betterproto's; their source, with all comments, is
``protos/proto/google/bytestream/bytestream.proto``.
"""

from lathe_protos.google.bytestream import *  # noqa: F403 -- this module is nothing but a short name for the generated one
