"""The endpoint's handler behind a small HTTP server on this machine, to try a model out before it is deployed.

    python examples/sagemaker/serve_local.py --model FOLDER --port 8080
    curl -d '{"inputs": "MKTAYIAKQR"}' -H 'Content-Type: application/json' localhost:8080/invocations

``/ping`` and ``/invocations`` answer as SageMaker's container does. It listens on loopback unless told otherwise and is
not made for the open network. FOLDER is an artifact of train.py, unpacked, or what ``export_model`` wrote.
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import inference

from esm_efficient import EsmEfficientError, Predictor, RequestError

logger = logging.getLogger("serve_local")


class Handler(BaseHTTPRequestHandler):
    """One connection; the model is used by one at a time."""

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
            inference.output_fn([], self.headers.get("Accept"))  # before the work, not after it
            with self.lock:
                predictions = inference.predict_fn(queries, self.predictor)
            self.answer(200, inference.output_fn(predictions, self.headers.get("Accept")))
        except RequestError as error:
            self.refuse(error.status, str(error))
        except ConnectionError:
            self.close_connection = True  # nobody is there to answer
        except Exception:
            logger.exception("a request failed")
            self.refuse(500, "the model could not answer: the server's log says why")

    def read_body(self) -> bytes:
        """The body, of which no more is read than may be there."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") or not (length.isascii() and length.isdecimal()):
            raise RequestError("Content-Length must say how many bytes the body has", status=411)
        if len(length) > 12 or int(length) > inference.LIMITS.bytes:
            raise RequestError(f"the body may have {inference.LIMITS.bytes:,} bytes", status=413)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise RequestError(f"the body has {len(body)} bytes, not {length}")
        return body

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server finds wrong with a request by itself; it calls an unknown method 501."""
        self.refuse(405 if code == 501 else code, message or "bad request")

    def refuse(self, status: int, message: str) -> None:
        # What is left of a body that was not read must not be taken for the next request.
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
    """A thread for each connection."""

    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 for a free one")
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
