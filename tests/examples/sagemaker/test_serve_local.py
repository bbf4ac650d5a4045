"""serve_local.py under load: correct responses, constant memory, and status 4xx for every wrong request."""

from __future__ import annotations

import http.client
import json
import random
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest
from aws_on_loopback import SCRIPTS
from conftest import make_model

from esm_efficient import Predictor
from esm_efficient.saving import portable_saving

REQUESTS, CLIENTS, BAD = 5_000, 8, 2_000
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    model = make_model(id2label={0: "soluble", 1: "membrane"}, label2id={"soluble": 0, "membrane": 1})
    with portable_saving(model):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model_dir):
    command = [sys.executable, "-W", "ignore", SCRIPTS / "serve_local.py", "--model", model_dir, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert "serving" in line, line
    process.port = int(line.rsplit(":", 1)[1])
    yield process
    assert process.poll() is None
    process.terminate()
    process.wait(timeout=20)


def call(port, method="POST", path="/invocations", body=None, headers=JSON):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text)


def sequence(rng: random.Random) -> str:
    return "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(5, 60)))


def test_ping_and_the_three_content_types(server, model_dir):
    assert call(server.port, "GET", "/ping", headers={}) == (200, {})
    (expected,) = Predictor.load(model_dir).predict(["MKTAYIAKQR"])
    bodies = {
        "application/json": json.dumps({"inputs": [{"name": "P1", "sequence": "MKTAYIAKQR"}]}),
        "text/csv": "name,sequence\nP1,MKTAYIAKQR\n",
        "text/x-fasta": ">P1 of somebody\nMKTAY\nIAKQR\n",
    }
    for content_type, body in bodies.items():
        status, (answer,) = call(server.port, body=body, headers={"Content-Type": content_type})
        assert status == 200
        assert answer["name"] == "P1"
        assert answer["label"] == expected.labels[0]
        assert answer["probabilities"] == pytest.approx(expected.to_dict()["probabilities"], abs=1e-6)


def test_five_thousand_requests_from_eight_clients(server, model_dir):
    rng = random.Random(0)
    pool = [sequence(rng) for _ in range(200)]
    expected = [p.to_dict()["probabilities"]["membrane"] for p in Predictor.load(model_dir).predict(pool)]
    resident: list[int] = []
    done, lock = [0], threading.Lock()

    def client(seed: int) -> int:
        """Send this client's share of the requests over one connection; return how many responses are correct."""
        own, correct = random.Random(seed), 0
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for _ in range(REQUESTS // CLIENTS):
            chosen = [own.randrange(len(pool)) for _ in range(own.randint(1, 3))]
            connection.request("POST", "/invocations", json.dumps({"inputs": [pool[i] for i in chosen]}), JSON)
            response = connection.getresponse()
            answers = json.loads(response.read())
            assert response.status == 200
            probabilities = [answer["probabilities"]["membrane"] for answer in answers]
            correct += probabilities == pytest.approx([expected[i] for i in chosen], abs=1e-6)
            with lock:
                done[0] += 1
                if done[0] % 1000 == 0:
                    resident.append(psutil.Process(server.pid).memory_info().rss)
        connection.close()
        return correct

    with ThreadPoolExecutor(CLIENTS) as clients:
        assert sum(clients.map(client, range(CLIENTS))) == REQUESTS
    assert len(resident) == REQUESTS // 1000
    # A leak of one kilobyte per request would be 4 MB between the first thousand requests and the last.
    assert max(resident[1:]) - resident[0] < 3 * 1024**2, [r / 1024**2 for r in resident]


def bad_request(rng: random.Random) -> tuple[bytes, dict[str, str]]:
    """Draw an invalid request: its body and headers."""
    good = json.dumps({"inputs": [sequence(rng)]}).encode()
    kind = rng.randrange(10)
    content_type = rng.choice(["application/json", "text/csv", "text/x-fasta"])
    if kind == 0:
        body = b"\xff" + rng.randbytes(rng.randint(0, 300))
    elif kind == 1:
        body, content_type = good[: rng.randint(0, len(good) - 2)], "application/json"
    elif kind == 2:
        body, content_type = (
            good,
            rng.choice(["text/plain", "application/x-npy", "image/png", "x", "multipart/form-data"]),
        )
    elif kind == 3:
        value = rng.choice([None, 1, 1.5, True, {}, [[]], [None], [1], "", " ", "*", "-", [{"sequence": 5}], [{}], []])
        body, content_type = json.dumps({"inputs": value}).encode(), "application/json"
    elif kind == 4:
        value = sequence(rng) + rng.choice("0123456789!@#\u00e9\u4e2d\u0000/\\<>") + sequence(rng)
        body, content_type = json.dumps({"inputs": value}).encode(), "application/json"
    elif kind == 5:
        body, content_type = json.dumps({"inputs": "M" * rng.randint(1023, 5000)}).encode(), "application/json"
    elif kind == 6:
        body, content_type = json.dumps({"inputs": ["MK"] * rng.randint(1001, 1500)}).encode(), "application/json"
    elif kind == 7:
        body, content_type = b"[" * rng.randint(1, 100_000), "application/json"
    elif kind == 8:
        body, content_type = f"id,label\n{sequence(rng)},1\n".encode(), "text/csv"
    else:
        body, content_type = f"{sequence(rng)}\n>x\n".encode(), "text/x-fasta"
    return body, {"Content-Type": content_type}


def test_two_thousand_bad_bodies_are_refused_and_the_server_still_responds(server):
    rng = random.Random(1)
    seen: dict[int, int] = {}
    for _ in range(BAD):
        body, headers = bad_request(rng)
        status, answer = call(server.port, body=body, headers=headers)
        assert 400 <= status < 500, (status, body[:200], headers)
        assert answer["error"]
        seen[status] = seen.get(status, 0) + 1
    assert set(seen) == {400, 413, 415}
    assert call(server.port, "GET", "/ping", headers={}) == (200, {})
    assert call(server.port, body='{"inputs": "MKT"}')[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/", None, {}, 404),
        ("GET", "/invocations", None, {}, 404),
        ("POST", "/ping", '{"inputs": "MK"}', JSON, 404),
        ("PUT", "/invocations", '{"inputs": "MK"}', JSON, 405),
        ("BREW", "/invocations", None, {}, 405),
        ("POST", "/invocations", '{"inputs": "MK"}', {**JSON, "Accept": "text/html"}, 406),
        ("POST", "/invocations", None, {**JSON, "Content-Length": "many"}, 411),
        ("POST", "/invocations", None, {**JSON, "Content-Length": "-5"}, 411),
        ("POST", "/invocations", None, {**JSON, "Content-Length": "9" * 5000}, 413),
        ("POST", "/invocations", None, {**JSON, "Content-Length": "3", "Transfer-Encoding": "chunked"}, 411),
        ("POST", "/invocations", None, {**JSON, "Content-Length": "7000000"}, 413),
    ],
)
def test_other_paths_methods_and_headers_are_refused(server, method, path, body, headers, status):
    received, answer = call(server.port, method, path, body, headers)
    assert received == status
    assert answer["error"]


def test_the_worker_of_a_gpu_uses_its_own(monkeypatch, model_dir):
    monkeypatch.syspath_prepend(SCRIPTS)
    import inference

    devices = []

    def load(folder, device, **options):
        devices.append(device)
        return SimpleNamespace(max_tokens=1024)

    monkeypatch.setattr(inference.Predictor, "load", load)
    for properties in ({"gpu_id": 2}, {"gpu_id": None}, {}):
        inference.model_fn(model_dir, SimpleNamespace(system_properties=properties))
    inference.model_fn(model_dir)
    assert devices == ["cuda:2", None, None, None]


def test_a_failed_prediction_is_status_500(monkeypatch, model_dir):
    monkeypatch.syspath_prepend(SCRIPTS)
    import serve_local

    def broken(queries, predictor):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(serve_local.inference, "predict_fn", broken)
    serve_local.Handler.predictor = serve_local.inference.model_fn(model_dir)
    with serve_local.Server(("127.0.0.1", 0), serve_local.Handler) as own:
        threading.Thread(target=own.serve_forever, daemon=True).start()
        status, answer = call(own.server_port, body='{"inputs": "MKT"}')
        own.shutdown()
    assert (status, answer) == (500, {"error": "the prediction failed: see the server's log"})


@pytest.mark.parametrize(
    "raw", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST /invocations HTTP/1.1\r\nbroken\r\n\r\n"]
)
def test_a_connection_without_valid_http_ends_and_others_are_unaffected(server, raw):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(raw)
        answer = connection.recv(4096)
    assert b" 4" in answer.split(b"\r\n")[0] or b'"error"' in answer
    # A client disconnects in the middle of its body.
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"POST /invocations HTTP/1.1\r\nContent-Length: 500\r\n\r\nabc")
    assert call(server.port, "GET", "/ping", headers={}) == (200, {})
