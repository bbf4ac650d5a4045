"""Run the endpoint's handler behind a small HTTP server on this machine, to try a model before deployment.

    python examples/sagemaker/serve_local.py --model FOLDER --port 8080
    curl -d '{"inputs": "MKTAYIAKQR"}' -H 'Content-Type: application/json' localhost:8080/invocations

``/ping`` and ``/invocations`` respond as in SageMaker's container. The server listens on loopback by default and is not
made for public networks. FOLDER is an unpacked artifact of train.py or an output of ``export_model``.
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import inference
from ranges import whole

from esm_efficient import EsmEfficientError, Predictor, RequestError

logger = logging.getLogger("serve_local")


class Handler(BaseHTTPRequestHandler):
    """Handles one connection; a lock lets one request at a time use the model."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    predictor: Predictor
    lock = threading.Lock()

    def do_GET(self) -> None:
        if self.path == "/ping":
            self.answer(200, "{}")
        else:
            self.refuse(404, "expected GET /ping or POST /invocations")

    def do_POST(self) -> None:
        try:
            body = self.read_body()
            if self.path != "/invocations":
                raise RequestError("expected GET /ping or POST /invocations", status=404)
            queries = inference.input_fn(body, self.headers.get("Content-Type"))
            inference.output_fn([], self.headers.get("Accept"))  # checks Accept before the prediction
            with self.lock:
                predictions = inference.predict_fn(queries, self.predictor)
            self.answer(200, inference.output_fn(predictions, self.headers.get("Accept")))
        except RequestError as error:
            self.refuse(error.status, str(error))
        except ConnectionError:
            self.close_connection = True  # the client has gone
        except Exception:  # one failed prediction must not end the server
            logger.exception("a request failed")
            self.refuse(500, "the prediction failed: see the server's log")

    def read_body(self) -> bytes:
        """Read the body, up to the limit of `RequestLimits.bytes`."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") or not (length.isascii() and length.isdecimal()):
            raise RequestError("expected a Content-Length header with the number of bytes of the body", status=411)
        if len(length) > 12 or int(length) > inference.limits.bytes:
            raise RequestError(
                f"the body is too large: at most {inference.limits.bytes:,} bytes are allowed", status=413
            )
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise RequestError(f"the body has {len(body)} bytes, but Content-Length is {length}")
        return body

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error that http.server itself detects; an unknown method is 405 here instead of 501."""
        self.refuse(405 if code == 501 else code, message or "bad request")

    def refuse(self, status: int, message: str) -> None:
        # Otherwise the unread rest of the body would be parsed as the next request.
        self.close_connection = True
        self.answer(status, json.dumps({"error": message}))

    def answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s %s", self.address_string(), format % args)


class Server(ThreadingHTTPServer):
    """Handles each connection in its own thread."""

    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=whole(0, 65535), default=8080, help="0 chooses a free port")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    Handler.predictor = inference.model_fn(options.model)
    with Server((options.host, options.port), Handler) as server:
        print(f"serving {options.model} at http://{options.host}:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    try:
        main()
    except EsmEfficientError as error:
        raise SystemExit(f"error: {error}") from error
