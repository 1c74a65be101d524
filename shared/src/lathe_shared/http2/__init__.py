"""A lean, bounded HTTP/2 engine for gRPC, and a grpclib server and channel on top of it.

The lower half does no I/O and knows no gRPC. ``connection`` takes bytes and gives bytes and calls; it is made of
layers, each of which adds a part: ``connection_state``, ``sending``, ``control_frames``, ``header_receiving``,
``data_receiving``, ``receiving``; with a ``stream`` for each exchange of messages. It stands on ``errors``, ``frames``,
``settings``, ``hpack``, ``header_rules``, ``floods`` and ``limits``. ``watch`` is its sense of time.

The upper half is gRPC on asyncio. ``server`` and ``channel`` are what others use. Below them, ``protocol`` runs a
connection on a transport, ``grpc_stream`` is a stream of messages (``message_framing``) to wait for, ``server_call``
and ``client_call`` are grpclib's calls on it, ``request_head`` is what a request's headers say, ``inline_calls``
answers small requests where they arrive, ``at_once_calls`` does so for some calls of other methods, and ``allocation``
keeps the C library from giving memory away.
"""
