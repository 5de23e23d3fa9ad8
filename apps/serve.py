"""`soundwave serve MODEL`: a server that OpenAI's clients can talk to.

    soundwave serve MODEL --port 8000
    curl http://127.0.0.1:8000/v1/audio/transcriptions -F file=@speech.wav -F response_format=srt

The routes are /v1/chat/completions (with `input_audio`), /v1/audio/transcriptions, /v1/models and /health.

Before a server that strangers reach belongs a reverse proxy: for TLS, and for connections on which no request comes.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from ipaddress import ip_address

import uvicorn

from soundwave.apps.cli import add_device_options, positive
from soundwave.apps.loading import load_model, load_processor, resolve_device, resolve_model
from soundwave.apps.server.app import build_app
from soundwave.apps.server.guard import Bounds
from soundwave.apps.server.served import Served, limits_for

KEY_VARIABLE = "SOUNDWAVE_API_KEY"
DOWNLOAD_S = 30  # for one recording on the Web
GRACE_S = 10  # for requests under way when the server is stopped


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="soundwave serve", description="Serve a model to the clients of OpenAI's API: chat and transcription."
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id: the one model that is served")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000; 0: any free one)")
    parser.add_argument("--api-key", metavar="KEY", help=f"what clients must send (default: ${KEY_VARIABLE}, or none)")
    add_device_options(parser)
    add = parser.add_argument_group("bounds, per request unless said otherwise").add_argument
    add("--max-body-mb", type=positive, default=64, metavar="N", help="body in MiB (default: 64)")
    add("--queue", type=positive, default=64, metavar="N", help="requests that may wait, in all (default: 64)")
    add("--max-audio-seconds", type=positive, default=4 * 3600, metavar="S", help="recording (default: 14400)")
    add("--max-chat-seconds", type=positive, default=300, metavar="S", help="sound in a chat (default: 300)")
    add("--max-new-tokens", type=positive, default=1024, metavar="N", help="longest chat answer (default: 1024)")
    add("--body-seconds", type=positive, default=120, metavar="S", help="time for the body to come (default: 120)")
    return parser


def load(arguments: argparse.Namespace) -> Served:
    """Return the model that the command line names, ready to work."""
    source = resolve_model(arguments.model)
    device, dtype = resolve_device(arguments.device, arguments.dtype)
    processor = load_processor(source)
    processor.audio_limits = dataclasses.replace(
        limits_for(arguments.max_audio_seconds, processor.audio_limits),
        max_download_bytes=arguments.max_body_mb * 2**20,
        download_timeout_s=DOWNLOAD_S,
    )
    return Served(
        load_model(source, device, dtype),
        processor,
        source,
        max_chat_seconds=arguments.max_chat_seconds,
        max_new_tokens=arguments.max_new_tokens,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until the process is interrupted or terminated; requests under way get some seconds to end.

    Raises:
        ValueError: for a model or an option that cannot be used.
        OSError: for a model that cannot be found.
    """
    arguments = build_parser().parse_args(argv)
    key = os.environ.get(KEY_VARIABLE) if arguments.api_key is None else arguments.api_key
    if key == "":
        raise ValueError(
            f"the API key is empty; give --api-key one, or leave it and ${KEY_VARIABLE} out to ask for none"
        )
    if key is None and not _is_loopback(arguments.host):
        print(f"soundwave serve: {arguments.host} may be reached by others, and no --api-key is set", file=sys.stderr)
    bounds = Bounds(
        max_body_bytes=arguments.max_body_mb * 2**20, queue=arguments.queue, body_seconds=arguments.body_seconds
    )
    app = build_app(load(arguments), key, bounds)
    config = uvicorn.Config(
        app, host=arguments.host, port=arguments.port, ws="none", timeout_graceful_shutdown=GRACE_S
    )
    uvicorn.Server(config).run()
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
