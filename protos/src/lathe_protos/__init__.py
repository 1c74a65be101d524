"""Wire messages: REAPI, the Google APIs that it uses, and Lathe's own worker API.

Import the short-named modules (``reapi``, ``bytestream``, ``longrunning``, ``rpc``, ``health``, ``worker_v1`` …);
the packages ``build``, ``google``, ``grpc`` and ``lathe`` beside them are generated and never edited.
"""
