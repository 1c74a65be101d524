"""PROPFIND, as little of it as lets WebDAV clients write.

sccache reaches an HTTP cache through a WebDAV library, which asks whether a folder is there before it writes into it,
and gives up where nobody understands the question. Keys need no folders, so each one is there.

Spec: RFC 4918, section 9.1, PROPFIND, and 14.16, multistatus.
"""

from __future__ import annotations

from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import quote
from xml.sax.saxutils import escape

from aiohttp import web

# Clients insist on a date; nothing here has one.
_LAST_MODIFIED = formatdate(0, usegmt=True)


def describe_collection(path: str) -> web.Response:
    """Describe what a path that ends with a slash names: a folder.

    Args:
        path: Decoded.
    """
    return _multistatus(path, "<D:resourcetype><D:collection/></D:resourcetype>")


def describe_value(path: str, size_bytes: int) -> web.Response:
    """Describe a value that is there.

    Args:
        path: Decoded.
        size_bytes: The value's size.
    """
    return _multistatus(path, f"<D:resourcetype/><D:getcontentlength>{size_bytes}</D:getcontentlength>")


def _multistatus(path: str, properties: str) -> web.Response:
    text = (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        '<D:multistatus xmlns:D="DAV:"><D:response>'
        f"<D:href>{escape(quote(path))}</D:href>"
        f"<D:propstat><D:prop>{properties}<D:getlastmodified>{_LAST_MODIFIED}</D:getlastmodified></D:prop>"
        "<D:status>HTTP/1.1 200 OK</D:status></D:propstat>"
        "</D:response></D:multistatus>\n"
    )
    return web.Response(status=HTTPStatus.MULTI_STATUS, text=text, content_type="application/xml")
