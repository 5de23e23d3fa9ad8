"""Recordings behind http(s) URLs and in `data:` URIs, within bounds."""

import base64
import binascii
import ipaddress
import re
import socket
import ssl
import tempfile
import threading
import time
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import IO
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit
from urllib.request import url2pathname

from .limits_soundwave import AudioFetchError, AudioFormatError, AudioLimitError, AudioLimits

PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
STALL_S = 30.0  # longest wait for the next bytes of a server
CHUNK = 2**16  # bytes
IN_MEMORY = 2**24  # bytes; larger files lie on disk while they are read
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Site-local addresses, and those of NAT64 within a network: not all versions of `ipaddress` know them as private.
NOT_PUBLIC = (ipaddress.ip_network("fec0::/10"), ipaddress.ip_network("64:ff9b:1::/48"))
UNQUOTED = "/%:=&~+!$,;'@()*?|[]"  # in a path and its query, beside letters and digits


def is_url(text: str) -> bool:
    """Whether a string is a URL rather than a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://|file:", text, re.IGNORECASE) is not None


def file_url_path(url: str, name: str, limits: AudioLimits) -> str | None:
    """The path of an allowed `file:` URL; `None` for other URLs."""
    if not url.lower().startswith("file:"):
        return None
    if not limits.allow_file_urls:
        raise AudioFetchError(
            f"{name} is refused: expected an http or https URL. Pass a local file as a path, or set "
            "AudioLimits.allow_file_urls where those who name the URL may read this machine's files."
        )
    return url2pathname(urlsplit(url).path)


def fetch(url: str, name: str, limits: AudioLimits) -> IO[bytes]:
    """Download a file of at most `max_download_bytes` within `download_timeout_s` in all.

    Every hop of a redirection is checked as the first one, and the connection goes to the very address that was
    checked. Proxies are not used: they would connect to addresses of their own choice.

    Raises:
        AudioFetchError: The URL is refused, or the server fails or takes too long.
        AudioLimitError: The file is too large.
    """
    deadline = time.monotonic() + limits.download_timeout_s
    try:
        for _ in range(MAX_REDIRECTS + 1):
            target = _request(url, name, limits, deadline)
            if not isinstance(target, str):
                return target
            url = urljoin(url, target)
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, AudioFetchError | AudioLimitError):
            raise
        if time.monotonic() < deadline:
            raise AudioFetchError(
                f"{name} cannot be downloaded ({error}); check the address, or pass a local file."
            ) from error
        raise AudioFetchError(
            f"{name} did not come within {limits.download_timeout_s:g} s; download it yourself and pass the path, or "
            "raise AudioLimits.download_timeout_s."
        ) from error
    raise AudioFetchError(f"{name} is redirected more than {MAX_REDIRECTS} times; pass the final address.")


def _request(url: str, name: str, limits: AudioLimits, deadline: float) -> IO[bytes] | str:
    """One hop: the file, or the address that the server redirects to."""
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), parts.hostname
    if scheme not in PORTS:
        raise AudioFetchError(f"{name} leads to a {scheme}: URL; expected http or https. Pass a local file as a path.")
    if not host:
        raise AudioFetchError(f"{name} cannot be downloaded: it names no host; check the address.")
    with closing(_connect(host, parts.port or PORTS[scheme], name, limits, deadline)) as opened:
        connected = opened
        if scheme == "https":
            context = ssl.create_default_context()
            connected = context.wrap_socket(opened, server_hostname=host, do_handshake_on_connect=False)
        # A time-out of the socket starts anew with every byte; this one ends the whole exchange. Shut down below TLS,
        # which would wait for the lock of the thread that reads.
        watchdog = threading.Timer(_left(deadline), _shut_down, [connected])
        watchdog.daemon = True
        watchdog.start()
        try:
            with closing(connected):
                if isinstance(connected, ssl.SSLSocket):
                    connected.do_handshake()
                connection = HTTPConnection(host, parts.port or PORTS[scheme])
                connection.default_port = PORTS[scheme]  # which the header Host leaves out
                connection.sock = connected
                path = quote((parts.path or "/") + ("?" + parts.query if parts.query else ""), safe=UNQUOTED)
                connection.request("GET", path, headers={"User-Agent": "soundwave", "Connection": "close"})
                with connection.getresponse() as response:
                    return _file_or_redirection(response, name, limits, deadline)
        finally:
            watchdog.cancel()


def _file_or_redirection(response: HTTPResponse, name: str, limits: AudioLimits, deadline: float) -> IO[bytes] | str:
    location = response.headers.get("Location")
    if response.status in REDIRECTS and location:
        return location
    if response.status != 200:
        raise AudioFetchError(
            f"{name} cannot be downloaded ({response.status} {response.reason}); check the address, or pass a local "
            "file."
        )
    announced = response.length or 0
    file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)
    size = 0
    while size <= limits.max_download_bytes and announced <= limits.max_download_bytes:
        chunk = response.read(CHUNK)
        if not chunk:
            break
        size += file.write(chunk)
    else:
        raise AudioLimitError(
            f"{name} has {max(size, announced)} bytes or more; expected at most {limits.max_download_bytes}. Download "
            "it yourself and pass the path, or raise AudioLimits.max_download_bytes."
        )
    if response.length or time.monotonic() >= deadline:  # what is left of the announced length, or cut off by us
        raise ConnectionError(f"the connection ended after {size} bytes")
    file.seek(0)
    return file


def _connect(host: str, port: int, name: str, limits: AudioLimits, deadline: float) -> socket.socket:
    """Connect to one of the addresses of a name, all of which must be allowed."""
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    refused = [address for address in addresses if not _is_public(address)]
    if refused and not limits.allow_private_addresses:
        raise AudioFetchError(
            f"{name} leads to {refused[0]}, which is no public address; expected one. Pass the file itself, or set "
            "AudioLimits.allow_private_addresses where those who name the URL may reach this network."
        )
    for address in addresses[:-1]:
        with suppress(OSError):
            return socket.create_connection((address, port), timeout=min(STALL_S, _left(deadline)))
    return socket.create_connection((addresses[-1], port), timeout=min(STALL_S, _left(deadline)))


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # An IPv4 address may be wrapped in one of version 6 in several ways, and is what is reached in the end.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(str(inner))
    special = ip.is_multicast or ip.is_reserved or ip.is_loopback or ip.is_link_local
    return ip.is_global and not special and not any(ip in network for network in NOT_PUBLIC)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no time is left")
    return left


def _shut_down(connected: socket.socket) -> None:
    with suppress(OSError):  # it may be closed already
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def decode_data_uri(uri: str, name: str, limits: AudioLimits) -> bytes:
    """The bytes in a `data:` URI."""
    header, comma, payload = uri.partition(",")
    if not comma:
        raise AudioFormatError(
            f"{name} is no data: URI; expected data:audio/wav;base64,<content>. Put a comma before the content."
        )
    if not header.lower().endswith(";base64"):
        limits.check_size(len(payload), name)
        return unquote_to_bytes(payload)
    limits.check_size(len(payload) * 3 // 4, name)
    try:
        return base64.b64decode(unquote_to_bytes(payload), validate=True)
    except binascii.Error as error:
        raise AudioFormatError(
            f"{name} holds invalid base64 ({error}); encode the bytes of the file as base64."
        ) from error
