"""URLs over loopback: sizes, times, redirections, refused addresses and schemes."""

import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from soundwave.processing import (
    AudioError,
    AudioFetchError,
    AudioFormatError,
    AudioLimitError,
    AudioLimits,
    load_audio,
)
from soundwave.processing import fetching_soundwave as fetching
from tests.sounds import encoded, noise, tone

WAVEFORM = tone(0.3)
CONTENT = encoded(WAVEFORM, subtype="FLOAT")
ALLOWED = AudioLimits(allow_private_addresses=True, download_timeout_s=20.0)


class Handler(BaseHTTPRequestHandler):
    """`/tone.wav` is a recording, `/to/URL` redirects, the others misbehave as their names say."""

    def do_GET(self):
        name = self.path.lstrip("/")
        if name.startswith("to/"):
            self.send_response(302)
            self.send_header("Location", name.removeprefix("to/"))
            self.end_headers()
        elif name == "loop":
            self.send_response(307)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif name == "drip":  # never silent for long, never done
            self._drip(b"HTTP/1.1 200 OK\r\n\r\n" + CONTENT)
        elif name == "drip-body":
            self.send_response(200)
            self.end_headers()
            self._drip(CONTENT)
        elif name in ("tone.wav", "short", "chunked", "lies", "t%C3%B6ne%20%231.wav?key=a%20b"):
            self.send_response(200)
            if name != "chunked":
                announced = {"short": len(CONTENT) + 10, "lies": 2**40}.get(name, len(CONTENT))
                self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(CONTENT)
        else:
            self.send_error(404)

    def _drip(self, content: bytes):
        for byte in content:
            try:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.02)

    def log_message(self, *_):
        pass


def serve(context: ssl.SSLContext | None = None):
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    if context is not None:
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    return httpd


@pytest.fixture(scope="module")
def server():
    httpd = serve()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(
    "path", ["tone.wav", "chunked", "to//tone.wav", "töne%20%231.wav?key=a%20b", "töne%20%231.wav?key=a b"]
)
def test_url(server, path):
    for url in (f"{server}/{path}", f"HTTP{server[4:]}/{path}#part"):
        np.testing.assert_array_equal(load_audio(url, limits=ALLOWED), WAVEFORM)


def test_url_by_name(server):
    np.testing.assert_array_equal(
        load_audio(f"http://localhost:{server.rpartition(':')[2]}/tone.wav", limits=ALLOWED), WAVEFORM
    )


def test_what_a_server_may_answer(server):
    with pytest.raises(AudioFetchError, match="404"):
        load_audio(f"{server}/missing.wav", limits=ALLOWED)
    with pytest.raises(AudioFetchError, match="connection ended after"):
        load_audio(f"{server}/short", limits=ALLOWED)
    with pytest.raises(AudioFetchError, match="redirected more than 5 times"):
        load_audio(f"{server}/loop", limits=ALLOWED)
    with pytest.raises(AudioLimitError, match="max_download_bytes"):
        load_audio(f"{server}/lies", limits=ALLOWED)
    for path in ("tone.wav", "chunked"):
        with pytest.raises(AudioLimitError, match="max_download_bytes"):
            load_audio(f"{server}/{path}", limits=AudioLimits(allow_private_addresses=True, max_download_bytes=100))


def test_an_address_of_version_6(server):
    port = int(server.rpartition(":")[2])
    try:
        socket.create_connection(("::ffff:127.0.0.1", port)).close()
    except OSError:
        pytest.skip("there is no IPv6 here")
    np.testing.assert_array_equal(load_audio(f"http://[::ffff:127.0.0.1]:{port}/tone.wav", limits=ALLOWED), WAVEFORM)


@pytest.mark.parametrize("path", ["drip", "drip-body"])
def test_a_server_that_drips_is_cut_off(server, path):
    limits = AudioLimits(allow_private_addresses=True, download_timeout_s=0.5)
    with pytest.raises(AudioFetchError, match="did not come within 0.5 s"):
        load_audio(f"{server}/{path}", limits=limits)


def test_a_server_that_is_silent_is_cut_off():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for scheme in ("http", "https"):
            limits = AudioLimits(allow_private_addresses=True, download_timeout_s=0.3)
            with pytest.raises(AudioFetchError, match="did not come within 0.3 s"):
                load_audio(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/tone.wav", limits=limits)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "10.1.2.3", "2130706433"]
)
def test_private_addresses_are_refused(host):
    with pytest.raises(AudioFetchError, match="no public address"):
        load_audio(f"http://{host}:9/tone.wav")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::5db8:d70e", True),
        ("127.8.9.1", False),
        ("192.168.1.1", False),
        ("172.16.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.251", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("0.0.0.0", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("fec0::1", False),
        ("64:ff9b:1::a9fe:a9fe", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a9fe:a9fe", False),
    ],
)
def test_public_addresses(address, public):
    assert fetching._is_public(address) == public


def test_every_address_of_a_name_counts(monkeypatch):
    # The resolver is not ours; what it says stands for a name that leads out and in.
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.215.14", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    with pytest.raises(AudioFetchError, match="leads to 10.0.0.1"):
        load_audio("http://two.example/tone.wav")


def test_redirections_are_checked_as_well(server, tmp_path):
    path = tmp_path / "tone.wav"
    path.write_bytes(CONTENT)
    limits = AudioLimits(allow_private_addresses=True, allow_file_urls=True)
    for target, message in [
        (path.as_uri(), "leads to a file: URL"),
        ("ftp://127.0.0.1/tone.wav", "leads to a ftp: URL"),
    ]:
        with pytest.raises(AudioFetchError, match=message):
            load_audio(f"{server}/to/{target}", limits=limits)


def test_a_redirection_to_a_private_address_is_refused(server, monkeypatch):
    monkeypatch.setattr(fetching, "_is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(AudioFetchError, match="127.0.0.2, which is no public address"):
        load_audio(f"{server}/to/http://127.0.0.2/tone.wav")


def test_file_urls_and_paths(tmp_path, processor):
    path = tmp_path / "tone: 1.wav"
    path.write_bytes(CONTENT)
    url = path.as_uri()
    for refused in (url, url.replace("file:///", "FILE:/"), url.replace("file:///", "file://localhost/")):
        with pytest.raises(AudioFetchError, match="allow_file_urls"):
            load_audio(refused)
    np.testing.assert_array_equal(load_audio(url, limits=AudioLimits(allow_file_urls=True)), WAVEFORM)
    with pytest.raises(AudioFormatError, match="not a file"):
        load_audio(url + ".gone", limits=AudioLimits(allow_file_urls=True))

    def inputs(**item):
        return processor.apply_chat_template([{"role": "user", "content": [{"type": "audio", **item}]}])

    assert inputs(path=str(path))["windows_per_audio"].tolist() == [1]
    with pytest.raises(AudioFetchError, match="allow_file_urls"):
        inputs(url=url)


@pytest.mark.parametrize(
    "url", ["ftp://example.org/x.wav", "gopher://x", "s3://bucket/x.wav", "concat://a", "jar:file:///x"]
)
def test_other_schemes_are_refused(url):
    with pytest.raises((AudioFetchError, AudioFormatError), match="expected"):
        load_audio(url)


def test_https_checks_the_certificate(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl cannot make a certificate here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    httpd = serve(context)
    try:
        with pytest.raises(AudioFetchError, match="CERTIFICATE_VERIFY_FAILED"):
            load_audio(f"https://localhost:{httpd.server_port}/tone.wav", limits=ALLOWED)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        url = f"https://localhost:{httpd.server_port}/"
        np.testing.assert_array_equal(load_audio(url + "tone.wav", limits=ALLOWED), WAVEFORM)
        with pytest.raises(AudioFetchError, match="did not come within"):
            load_audio(url + "drip", limits=AudioLimits(allow_private_addresses=True, download_timeout_s=0.5))
        with pytest.raises(AudioFetchError, match="not valid for '127.0.0.1'"):
            load_audio(f"https://127.0.0.1:{httpd.server_port}/tone.wav", limits=ALLOWED)
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_nothing_stays_open(server):
    before = threading.active_count()
    for _ in range(3):
        load_audio(f"{server}/tone.wav", limits=ALLOWED)
        with pytest.raises(AudioError):
            load_audio(f"{server}/missing.wav", limits=ALLOWED)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before, "watchdogs end with their downloads"


def test_a_processor_has_its_own_limits(server, processor):
    assert processor.audio_limits == AudioLimits()
    with pytest.raises(AudioFetchError, match="no public address"):
        processor.load_audio(f"{server}/tone.wav")
    try:
        processor.audio_limits = ALLOWED
        np.testing.assert_array_equal(processor.load_audio(f"{server}/tone.wav"), WAVEFORM)
        blocks = processor.stream_audio(f"{server}/tone.wav")
        assert [window.frames for window in processor.stream_windows(blocks)] == [32]
        processor.audio_limits = AudioLimits(max_duration_s=1.0)
        with pytest.raises(AudioLimitError):
            processor(noise(20_000), sampling_rate=16_000)
        assert "audio_limits" not in processor.to_dict()
    finally:
        del processor.audio_limits
