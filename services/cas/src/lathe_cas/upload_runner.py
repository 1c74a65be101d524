"""Drives an UploadSession between a gRPC stream and the blob store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lathe_cas.blob_store import UploadName
from lathe_cas.upload_session import UploadSession, UploadState
from lathe_shared.cas_wire import read_write_request
from lathe_shared.compressor import Compressor
from lathe_shared.errors import LatheError, ResourceExhaustedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from lathe_cas.blob_store import BlobStore, Upload
    from lathe_shared.resource_name import WriteResource


COMPRESSED_IS_THERE = -1
"""Committed size of a compressed upload that was not needed. Spec: REAPI, ContentAddressableStorage, on uploads."""


IDLE_SECONDS = 300.0
"""How long a client may pause between two messages: many times what a slow disk or a lost packet takes. Each stream
holds up to some 8 MiB that its client sent, and a place among those of its connection."""


async def run_upload(
    messages: AsyncIterator[bytes],
    store: BlobStore,
    parse: Callable[[str], WriteResource],
    count: Callable[[int], None] = lambda _: None,
    idle_seconds: float = IDLE_SECONDS,
) -> int:
    """Receive one Write stream and return its committed size.

    Returns before the stream ends when the blob is there already, or appears meanwhile by another stream's work; the
    committed size is then the blob's, or -1 for a compressed upload.

    Args:
        messages: The serialized WriteRequests.
        store: Where the blob goes.
        parse: Turns the resource name into what it names; refuses instances and compressors that are not served.
        count: Told the size of each message.
        idle_seconds: How long to wait for a message.

    Raises:
        InvalidArgumentError: The stream breaks the protocol, or its bytes are not the blob.
        AbortedError: Another stream has taken this upload over, or others that brought the same blob have spoilt it.
        ResourceExhaustedError: No room is left.
        UnavailableError: No message came for ``idle_seconds``; what had arrived is kept, so that the client can resume.

    Cancellation: What has arrived is kept in the background, so that the client can resume.
    """
    messages = _while_they_come(messages, idle_seconds)
    session = UploadSession(parse)
    async for message in messages:
        count(len(message))
        session.receive(read_write_request(message))
        break
    session.end_of_stream()
    resource = session.resource
    name = UploadName(resource.instance_name, resource.upload_id, resource.digest, resource.compressor)
    is_plain = resource.compressor is Compressor.IDENTITY
    there_already = resource.digest.size_bytes if is_plain else COMPRESSED_IS_THERE
    whole = session.whole
    if whole is not None and (is_plain or not (await store.upload_status(name)).complete):
        # As most blobs come: there is nothing to resume, so nothing to open.
        await store.put_upload(name, whole)
        return len(whole)
    if (await store.upload_status(name)).complete:
        return there_already
    upload = await store.open_upload(name, restart=session.restarts)
    try:
        session.opened(upload.committed_bytes)
        if not await _receive(messages, session, store, name, upload, count):
            await upload.abandon()
            return there_already
    except LatheError as error:
        await _end_after_error(session, upload, error)
        raise
    except BaseException:
        upload.suspend_soon(*session.take())
        raise
    if session.is_finished():
        await upload.finish()
        return session.committed_size
    return await upload.suspend()


async def _while_they_come(messages: AsyncIterator[bytes], idle_seconds: float) -> AsyncGenerator[bytes, None]:
    while True:
        try:
            async with asyncio.timeout(idle_seconds):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise UnavailableError(
                f"no message came for {idle_seconds:g} seconds; what had arrived is kept: QueryWriteStatus tells where "
                "to go on"
            ) from None
        yield message


async def _receive(
    messages: AsyncIterator[bytes],
    session: UploadSession,
    store: BlobStore,
    name: UploadName,
    upload: Upload,
    count: Callable[[int], None],
) -> bool:
    """Receive until the stream ends or is finished; False if the blob has appeared meanwhile."""
    if not session.is_finished():
        async for message in messages:
            count(len(message))
            session.receive(read_write_request(message))
            if session.is_finished():
                break
            if session.has_enough:
                if (await store.upload_status(name)).complete:
                    return False
                await upload.append(*session.take())
    await upload.append(*session.take())
    return True


async def _end_after_error(session: UploadSession, upload: Upload, error: LatheError) -> None:
    """Keep what was right; the error that is under way matters more than one that this meets.

    Not if there was no room: several uploads that hold on to what they have would keep the room from each other.
    """
    try:
        if session.state is UploadState.SPOILT or isinstance(error, ResourceExhaustedError):
            await upload.abandon()
        else:
            await upload.suspend(*session.take())
    except LatheError:
        pass
