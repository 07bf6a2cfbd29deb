import asyncio
import base64
import contextlib
import csv
import io
import json
import re
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from starlette.testclient import TestClient

from kka_ray.config.serve import ServeConfig
from kka_ray.data.decode import encode_png
from kka_ray.scoring import load_detector, score_folder
from kka_ray.serving.access import digest
from kka_ray.serving.app import ImageScore, create_app
from kka_ray.serving.refusal import Refusal
from kka_ray.serving.scorer import ImageScorer, Item, Judgement
from kka_ray.serving.upload import check_image

TOKEN = "a-token-for-the-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
LIMITS = ServeConfig(max_bytes=20_000, max_total_bytes=50_000, max_pixels=10_000, max_images=3, timeout=2)


class Fake:
    """Judges by the mean of the pixels; remembers what it was shown."""

    def __init__(self):
        self.seen: list[Item] = []
        self.available = True

    async def score(self, items):
        if not self.available:
            raise Refusal(503, "unavailable", "no detector")
        self.seen += items
        return [Judgement(1.5, 2.5, 99.0, True, 1.0, b"png" if item.heatmap else None) for item in items]

    async def describe(self):
        if not self.available:
            raise Refusal(503, "unavailable", "no detector")
        return {"detector": "fake"}


class Local:
    """A detector in this process."""

    def __init__(self, run, config):
        self.scorer = ImageScorer(load_detector(run), config)

    async def score(self, items):
        return self.scorer.score(items)

    async def describe(self):
        return self.scorer.describe()


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def client(fake):
    return TestClient(create_app(fake, LIMITS, digest(TOKEN)), raise_server_exceptions=False)


def _png(height: int = 8, width: int = 8, seed: int = 0) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _post(client, *contents: bytes, query: str = "", headers=BEARER):
    files = [("images", (f"{i}.png", content, "image/png")) for i, content in enumerate(contents)]
    return client.post(f"/v1/score{query}", files=files, headers=headers)


def _refused(reply, status: int, code: str) -> dict:
    body = reply.json()
    assert (reply.status_code, body["error"]) == (status, code), body
    assert body["reason"]
    assert set(body) == {"error", "reason", "file"}
    return body


def test_each_image_has_its_scores_in_order(client, fake):
    reply = _post(client, _png(seed=1), _png(seed=2))
    assert reply.status_code == 200
    images = reply.json()["images"]
    assert [image["file"] for image in images] == ["0.png", "1.png"]
    assert images[0] == {
        "file": "0.png",
        "score": 1.5,
        "robust_z": 2.5,
        "percentile": 99.0,
        "verdict": "anomalous",
        "threshold": 1.0,
        "heatmap": None,
    }
    assert [item.content for item in fake.seen] == [_png(seed=1), _png(seed=2)]


def test_heatmaps_come_only_if_asked_for(client):
    assert (
        _post(client, _png(), query="?heatmap=true").json()["images"][0]["heatmap"] == base64.b64encode(b"png").decode()
    )
    assert _post(client, _png(), query="?heatmap=false").json()["images"][0]["heatmap"] is None


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer ünïcode"]
)
def test_strangers_are_refused_before_anything_is_read(client, fake, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    body = _refused(_post(client, b"x" * 100_000, query="?heatmap=maybe", headers=headers), 401, "unauthorised")
    assert "heatmap" not in str(body)
    assert _post(client, _png(), headers=headers).headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/model", headers=headers).status_code == 401
    assert fake.seen == []


def test_the_body_of_a_stranger_is_not_read(fake):
    app, sent, reads = create_app(fake, LIMITS, digest(TOKEN)), [], []

    async def receive():
        reads.append(1)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    asyncio.run(app(_scope([]), receive, send))
    assert sent[0]["status"] == 401
    assert reads == []


def _scope(headers) -> dict:
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/score",
        "raw_path": b"/v1/score",
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "server": ("x", 1),
        "client": ("y", 2),
        "root_path": "",
    }


def _authorised_scope() -> dict:
    return _scope(
        [
            (b"authorization", f"Bearer {TOKEN}".encode()),
            (b"content-type", b"multipart/form-data; boundary=b"),
            (b"transfer-encoding", b"chunked"),
        ]
    )


def test_an_endless_body_is_cut_off_at_the_limit(fake):
    app, sent, taken = create_app(fake, LIMITS, digest(TOKEN)), [], [0]

    async def receive():
        # Parts of 15 kB, each below the limit of one image.
        part = b'--b\r\nContent-Disposition: form-data; name="i"; filename="x"\r\n\r\n' + b"x" * 15_000 + b"\r\n"
        taken[0] += len(part)
        return {"type": "http.request", "body": part, "more_body": True}

    async def send(message):
        sent.append(message)

    limits = LIMITS.model_copy(update={"max_images": 100})
    app = create_app(fake, limits, digest(TOKEN))
    asyncio.run(asyncio.wait_for(app(_authorised_scope(), receive, send), 20))
    assert sent[0]["status"] == 413
    assert b"request_too_large" in sent[1]["body"]
    assert taken[0] < 70_000


def test_a_body_that_does_not_arrive_is_given_up(fake):
    app, sent = create_app(fake, LIMITS.model_copy(update={"timeout": 0.05}), digest(TOKEN)), []

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(_authorised_scope(), receive, send), 20))
    assert sent[0]["status"] == 408


def test_a_detector_that_does_not_answer_is_given_up(fake):
    async def hang(items):
        await asyncio.sleep(60)

    fake.score = hang
    client = TestClient(create_app(fake, LIMITS.model_copy(update={"timeout": 0.05}), digest(TOKEN)))
    _refused(_post(client, _png()), 503, "too_slow")
    fake.describe = lambda: hang([])
    _refused(client.get("/v1/model", headers=BEARER), 503, "too_slow")


def test_reading_and_scoring_have_one_timeout_together(fake):
    app, sent = create_app(fake, LIMITS.model_copy(update={"timeout": 1}), digest(TOKEN)), []
    part = b'--b\r\nContent-Disposition: form-data; name="i"; filename="x"\r\n\r\n' + _png() + b"\r\n--b--\r\n"

    async def receive():
        await asyncio.sleep(0.6)
        return {"type": "http.request", "body": part, "more_body": False}

    async def send(message):
        sent.append(message)

    async def hang(items):
        await asyncio.sleep(60)

    fake.score = hang
    begin = time.monotonic()
    asyncio.run(asyncio.wait_for(app(_authorised_scope(), receive, send), 20))
    assert sent[0]["status"] == 503
    assert time.monotonic() - begin < 1.5


def test_limits_of_size_and_number(client, fake):
    noise = _png(90, 90)  # 24 kB
    assert len(noise) > LIMITS.max_bytes
    assert _refused(_post(client, _png(), noise), 413, "image_too_large")["file"] == "1.png"
    _refused(_post(client, *[b"x" * 19_000] * 3), 413, "request_too_large")
    _refused(_post(client, *[_png()] * 4), 413, "too_many_images")
    assert fake.seen == []


def test_pixels_are_counted_before_they_are_decoded(client, fake):
    # 400 million pixels in a few bytes: the header of a PNG, with the rest missing.
    bomb = bytearray(_png())
    bomb[16:24] = (20_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    assert _refused(_post(client, bytes(bomb)), 413, "too_many_pixels")["file"] == "0.png"
    _refused(_post(client, encode_png(np.zeros((101, 100, 3), np.uint8))), 413, "too_many_pixels")
    assert _post(client, encode_png(np.zeros((100, 100, 3), np.uint8))).status_code == 200
    assert len(fake.seen) == 1


def test_the_limit_of_pixels_is_our_own_and_holds_for_tiles(client, fake):
    # 200 million pixels, which Pillow itself would refuse: a PNG's header with the rest missing.
    header = bytearray(_png())
    header[16:24] = (20_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    check_image(bytes(header), "a.png", ServeConfig(max_pixels=200_000_000))
    with pytest.raises(Refusal, match="20000 x 10000 pixels, more than the limit of 199999999"):
        check_image(bytes(header), "a.png", ServeConfig(max_pixels=199_999_999))
    stream = io.BytesIO()
    Image.new("L", (16, 16)).save(stream, "TIFF", tiffinfo={65_000: 101, 65_001: 100})
    tiled = stream.getvalue()
    for private, tag in ((65_000, 322), (65_001, 323)):  # Pillow does not write the size of tiles
        tiled = tiled.replace(struct.pack("<H", private), struct.pack("<H", tag))
    assert "tiles of 101 x 100 pixels" in _refused(_post(client, tiled), 413, "too_many_pixels")["reason"]
    assert fake.seen == []


@pytest.mark.parametrize("lossless", [False, True])
def test_the_size_of_a_webp_is_read_without_pillow(client, lossless, monkeypatch):
    stream = io.BytesIO()
    Image.fromarray(np.zeros((101, 100, 3), np.uint8)).save(stream, "WEBP", lossless=lossless)
    monkeypatch.setattr(Image, "open", None)
    assert "100 x 101 pixels" in _refused(_post(client, stream.getvalue()), 413, "too_many_pixels")["reason"]
    extended = bytearray(stream.getvalue())
    extended[12:16], extended[24:30] = b"VP8X", (16_382).to_bytes(3, "little") + (9).to_bytes(3, "little")
    assert "16383 x 10 pixels" in _refused(_post(client, bytes(extended)), 413, "too_many_pixels")["reason"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_all_formats_pass_and_can_be_forbidden(client, fake, kind):
    stream = io.BytesIO()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(stream, kind)
    assert _post(client, stream.getvalue()).status_code == 200
    other = "GIF" if kind == "PNG" else "PNG"
    strict = TestClient(create_app(fake, ServeConfig(formats=(other,)), digest(TOKEN)))
    assert other in _refused(_post(strict, stream.getvalue()), 415, "unknown_format")["reason"]


def test_sound_images_of_a_kind_that_is_not_read_are_not_called_damaged(client, fake):
    for dtype in (np.int32, np.float32):
        stream = io.BytesIO()
        Image.fromarray(np.ones((4, 4), dtype)).save(stream, "TIFF")
        assert "32-bit" in _refused(_post(client, stream.getvalue()), 415, "unsupported_image")["reason"]
    stream = io.BytesIO()
    Image.new("L", (16, 16)).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    bomb = content[:-2] + scan * 100 + content[-2:]
    assert "100 scans" in _refused(_post(client, bomb), 415, "unsupported_image")["reason"]
    assert fake.seen == []


def test_what_is_no_image_is_refused(client, fake):
    _refused(_post(client, b"<svg></svg>"), 415, "unknown_format")
    _refused(_post(client, b""), 400, "corrupt_image")
    _refused(_post(client, _png()[:20]), 400, "corrupt_image")
    assert fake.seen == []


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("application/json", b"{}", 415, "not_multipart"),
        ("multipart/form-data", b"", 415, "not_multipart"),
        ("multipart/form-data; boundary=b", b"garbage", 400, "broken_multipart"),
        ("multipart/form-data; boundary=b", b"", 400, "broken_multipart"),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 422, "no_image"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\nabc',
            400,
            "broken_multipart",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nabc\r\n--b--\r\n',
            422,
            "not_a_file",
        ),
    ],
)
def test_broken_bodies_are_refused(client, content_type, body, status, code):
    reply = client.post("/v1/score", content=body, headers=BEARER | {"Content-Type": content_type})
    _refused(reply, status, code)


def test_wrong_queries_and_paths_are_json_errors_too(client):
    assert "heatmap" in _refused(_post(client, _png(), query="?heatmap=maybe"), 422, "invalid")["reason"]
    _refused(client.get("/nowhere"), 404, "http")
    _refused(client.post("/v1/score/", headers=BEARER, follow_redirects=False), 404, "http")
    _refused(client.get("/v1/score", headers=BEARER), 405, "http")


def test_a_failure_of_the_service_tells_nothing(client, fake):
    async def fail(items):
        raise ValueError("secret path /home/x")

    fake.score = fail
    assert "secret" not in str(_refused(_post(client, _png()), 500, "internal"))


def test_health_and_readiness(client, fake):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    fake.available = False
    assert client.get("/healthz").status_code == 200
    _refused(client.get("/readyz"), 503, "unavailable")
    _refused(_post(client, _png()), 503, "unavailable")


def test_the_interface_is_described_without_a_token_and_tells_nothing_of_the_model(client, fake):
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/v1/score", "/v1/model", "/healthz", "/readyz"}
    assert set(described["components"]["schemas"]["ImageScore"]["properties"]) == set(ImageScore.model_fields)
    assert "fake" not in str(described)
    (scheme,) = described["components"]["securitySchemes"].items()
    assert scheme[1].items() >= {"type": "http", "scheme": "bearer"}.items()
    for path, methods in described["paths"].items():
        (operation,) = methods.values()
        assert operation.get("security", []) == ([{scheme[0]: []}] if path.startswith("/v1/") else [])
    assert {"401", "503"} <= set(described["paths"]["/v1/model"]["get"]["responses"])
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


def test_the_documentation_names_every_code_and_field():
    root = Path(__file__).parents[2]
    text = (root / "docs" / "serving.md").read_text()
    sources = "".join(file.read_text() for file in (root / "kka_ray" / "serving").glob("*.py"))
    codes = set(re.findall(r'Refusal\(\s*(\d+), "(\w+)"', sources)) | set(
        re.findall(r'_error\((\d+), "(\w+)"', sources)
    )
    assert len(codes) >= 16
    for status, code in codes:
        assert re.search(rf"^\| .*{status}.* \| .*`{code}`", text, re.MULTILINE), (status, code)
    for name in ImageScore.model_fields:
        assert f"| `{name}` |" in text
    example = json.loads(text.split("```json")[1].split("```")[0])
    assert ImageScore.model_validate(example["images"][0], strict=True)


def test_the_page_is_whole_and_runs_only_its_own_script(client):
    reply = client.get("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http://" not in reply.text
    assert "https://" not in reply.text
    assert reply.text.count("<script") == reply.text.count("<style") == 1
    assert "innerHTML" not in reply.text
    assert "Storage" not in reply.text
    assert reply.headers["x-content-type-options"] == "nosniff"


# --- with a real detector ---


@pytest.fixture
def folder(flowers, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(encode_png(flowers[20 + i]))
    (folder / "3.png").write_bytes(_png(48, 32))
    return folder


def _folder_scores(folder, run, tmp_path) -> dict[str, dict]:
    score_folder(folder, run, tmp_path / "scores", heatmaps=False, console=Console(file=io.StringIO()))
    with (tmp_path / "scores" / "scores.csv").open(newline="") as stream:
        return {row["file"]: row for row in csv.DictReader(stream)}


def _assert_same(images: list[dict], rows: dict[str, dict]) -> None:
    assert len(images) == len(rows)
    for image in images:
        row = rows[image["file"]]
        assert image["score"] == pytest.approx(float(row["score"]), abs=1e-5)
        assert image["robust_z"] == pytest.approx(float(row["robust_z"]), rel=1e-3, abs=1e-2)
        assert image["percentile"] == pytest.approx(float(row["percentile"]), abs=0.1)
        assert image["verdict"] == row["verdict"]


def test_scores_are_those_of_score_folder(run, folder, tmp_path):
    client = TestClient(create_app(Local(run, ServeConfig()), ServeConfig(), digest(TOKEN)))
    reply = _post(client, *(file.read_bytes() for file in sorted(folder.iterdir())))
    rows = _folder_scores(folder, run, tmp_path)
    _assert_same(reply.json()["images"], rows)
    assert {row["verdict"] for row in rows.values()} == {"normal", "anomalous"}
    model = client.get("/v1/model", headers=BEARER).json()
    assert model["detector"] == "knn"
    assert model["threshold"] == reply.json()["images"][0]["threshold"]
    assert len(model["backbone"]["identity"]) == 64


def test_an_image_that_is_cut_short_is_named_and_does_not_touch_others(run, flowers):
    scorer = Local(run, ServeConfig()).scorer
    good, cut = encode_png(flowers[0]), encode_png(flowers[1])[:-100]
    judged = scorer.score([Item("a", good), Item("cut.png", cut), Item("b", good)])
    assert isinstance(judged[0], Judgement)
    assert judged[0].score == pytest.approx(judged[2].score, abs=1e-6)
    assert "cut short or damaged" in judged[1].reason
    client = TestClient(create_app(Local(run, ServeConfig()), ServeConfig(), digest(TOKEN)))
    assert _refused(_post(client, good, cut), 400, "corrupt_image")["file"] == "1.png"


@pytest.mark.slow
def test_a_real_service_scores_and_refuses(run, folder, tmp_path, monkeypatch):
    import httpx2
    import ray
    from ray import serve

    from kka_ray.cluster.session import session
    from kka_ray.config.models import ClusterConfig
    from kka_ray.serving import start
    from kka_ray.serving.proxy import installed

    monkeypatch.setenv("KKA_SERVE_TOKEN", TOKEN)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ServeConfig(port=port, cpus=0.5, max_bytes=100_000, max_total_bytes=1_000_000, max_pixels=100_000)
    said: list[str] = []
    with installed(digest(TOKEN), config.max_total_bytes), session(ClusterConfig()):
        try:
            service = start(run, config, blocking=False, say=said.append)
            assert TOKEN not in "".join(said)
            with httpx2.Client(base_url=service.url, timeout=60) as client:
                _check_service(client, folder, _folder_scores(folder, run, tmp_path))
            assert _flood(port, TOKEN).startswith(b"HTTP/1.1 413")
            with _saturated(port, config.ongoing):
                # Nothing answers at the moment; the proxy does by itself, and keeps nothing.
                assert _flood(port, "a-stranger-s-token").startswith(b"HTTP/1.1 401")
                assert _flood(port, TOKEN).startswith(b"HTTP/1.1 413")
        finally:
            serve.shutdown()
    assert not ray.is_initialized()


def _check_service(client, folder, rows) -> None:
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200
    good = [file.read_bytes() for file in sorted(folder.iterdir())]
    _assert_same(_post(client, *good).json()["images"], rows)
    replies: list = []
    threads = [threading.Thread(target=lambda: replies.append(_post(client, *good))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for reply in replies:
        _assert_same(reply.json()["images"], rows)
    assert len(replies) == 4
    _refused(_post(client, good[0], good[1][:-100]), 400, "corrupt_image")
    _refused(_post(client, b"no image"), 415, "unknown_format")
    _refused(_post(client, encode_png(np.zeros((400, 400, 3), np.uint8))), 413, "too_many_pixels")
    _refused(_post(client, b"x" * 200_000), 413, "image_too_large")
    _refused(_post(client, b"x" * 3_000_000), 413, "request_too_large")
    _refused(_post(client, good[0], headers={}), 401, "unauthorised")
    assert client.get("/v1/model", headers=BEARER).json()["detector"] == "knn"
    assert "Score an image" in client.get("/").text


@contextlib.contextmanager
def _saturated(port: int, ongoing: int):
    """As many requests as the ingress holds, whose bodies do not end."""
    with contextlib.ExitStack() as stack:
        for _ in range(ongoing):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            slow.sendall(_head(TOKEN) + b"5\r\n--b\r\n\r\n")
        time.sleep(1)
        yield


def _head(token: str) -> bytes:
    return (
        f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nTransfer-Encoding: chunked\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    ).encode()


def _flood(port: int, token: str) -> bytes:
    """The answer to a body without end, in chunks; the client is hung up on long before it would stop."""
    part = b'--b\r\nContent-Disposition: form-data; name="i"; filename="x"\r\n\r\n' + b"x" * 65_536
    sent, answer = 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(_head(token))
        connection.settimeout(0.05)
        end = time.monotonic() + 20
        while not answer and time.monotonic() < end and sent < 50_000_000:
            try:
                connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
                sent += len(part)
                part = b"x" * 65_536
                answer = connection.recv(4096)
            except TimeoutError:
                continue
    assert sent < 5_000_000
    return answer
