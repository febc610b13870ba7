"""The explorer over HTTP: responses, access control, and load on the database."""

import contextlib
import gzip
import http.client
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import iot_collector.explorer
import pytest
from iot_collector.explorer import Explorer, queries
from iot_collector.explorer.reader import Reader, UnavailableError
from iot_collector.explorer.topics import Topics, oldest
from iot_collector.explorer.web import VIEWERS
from iot_collector.settings import Settings

from testing.collector import Collector
from testing.mosquitto import Mosquitto
from testing.postgres import Database, Postgres
from testing.publisher import publish
from testing.service import HOST, eventually

ROOT = Path(__file__).parents[3]
ASSETS = Path(iot_collector.explorer.__file__).parent / "assets"
Answer = tuple[int, dict[str, str], bytes]
JSON = {"Content-Type": "application/json"}


def connect(collector: Collector) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(HOST, int(collector.settings["IOT_HTTP_PORT"]), timeout=30)


def get(collector: Collector, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    with contextlib.closing(connect(collector)) as connection:
        connection.request(
            "GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, answer.read()


class Viewer:
    """A viewer: an event stream of the explorer, read in a thread."""

    def __init__(self, collector: Collector, name: str = "test", **view: Any) -> None:
        self.connection = connect(collector)
        body = json.dumps({"viewer": name, "open": [""], **view})
        self.connection.request("POST", "/explorer/stream", body, JSON)
        self._socket = self.connection.sock
        self.answer = self.connection.getresponse()
        self.events: list[tuple[str, Any]] = []
        self.ended = threading.Event()
        if self.answer.status == 200:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        name = ""
        with contextlib.suppress(OSError, ValueError, AttributeError, http.client.HTTPException):
            for line in self.answer:
                kind, _, content = line.rstrip(b"\n").decode().partition(": ")
                if kind == "event":
                    name = content
                elif kind == "data":
                    self.events.append((name, json.loads(content)))
        self.ended.set()

    def all(self, name: str) -> list[Any]:
        return [content for kind, content in list(self.events) if kind == name]

    def last(self, name: str, good: Callable[[Any], object] = lambda _: True) -> Any:
        """Wait for an event ``name`` with ``good`` content; return the content of the last one."""
        what = f"an event {name} of {self.events[-3:]}"
        return eventually(lambda: [c for c in self.all(name) if good(c)] or None, what=what)[-1]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.connection.close()


@pytest.fixture
def watch(collector: Collector) -> Iterator[Callable[..., Viewer]]:
    """Open event streams of the collector. They are closed at the end of the test."""
    made: list[Viewer] = []

    def make(*arguments: Any, **options: Any) -> Viewer:
        made.append(Viewer(collector, *arguments, **options))
        return made[-1]

    yield make
    for viewer in made:
        viewer.close()


def fill(database: Database, topics: int) -> None:
    database.query(
        "INSERT INTO messages (received_at, topic, payload, fields, qos, retained) "
        "SELECT now() - i * interval '1 ms', 'area/' || i / 100 || '/device-' || i, 'n:1',"
        " '{\"n\": 1}', 1, false FROM generate_series(0, %s) i",
        topics - 1,
    )


def settings_of(database: Database, **more: Any) -> Settings:
    return Settings(database_url=database.url, database_password=database.password, **more)


# What it shows -------------------------------------------------------------------------------


def test_stream_has_topics_messages_and_state(
    watch: Callable[..., Viewer], broker: Mosquitto, collector: Collector
) -> None:
    publish(broker, [("plant/a/press", b"temperature:%d" % n) for n in range(5)])
    publish(broker, [("plant/b", b"\xff\x00"), ("plant/a", b"state:on")])
    collector.wait_settled(7)
    viewer = watch(open=["", "plant/"], topic="plant/a/press")
    tree = viewer.last("tree")
    assert tree["topics"] == 3
    assert tree["complete"]
    [root] = tree["branches"][""]["nodes"]
    assert (root["path"], root["topic"], root["below"]) == ("plant", None, 3)
    below = tree["branches"]["plant/"]["nodes"]
    # A node can be a topic and have topics below it.
    assert [(n["path"], n["topic"], n["below"]) for n in below] == [
        ("plant/a", "plant/a", 1),
        ("plant/b", "plant/b", 0),
    ]
    messages = viewer.last("messages", bool)
    assert [m["fields"]["temperature"] for m in messages] == [4, 3, 2, 1, 0]
    assert {m["qos"] for m in messages} == {1}
    latest = {topic: rest for topic, *rest in viewer.last("latest")}
    assert latest["plant/a"][1] == {"state": "on"}
    assert latest["plant/b"][1:] == [None, "/wA=", 2]
    activity = viewer.last("activity")
    assert activity["messages"] == 7
    assert activity["nodes"] == {"plant": 7, "plant/a": 6, "plant/b": 1}
    assert activity["busiest"][0] == ["plant/a/press", 5]
    pipeline = viewer.last("pipeline")
    assert pipeline["health"]["accounting"]["inserted"] == 7

    publish(broker, [("plant/a/press", b"temperature:99")])
    viewer.last("messages", lambda new: [m["fields"] for m in new] == [{"temperature": 99}])
    publish(broker, [("new/topic", b"x")])
    viewer.last("tree", lambda tree: len(tree["branches"][""]["nodes"]) == 2)


def test_message_that_is_stored_late_is_shown(
    watch: Callable[..., Viewer], database: Database
) -> None:
    """A second collector can be slow, or its clock can be behind."""
    fill(database, 1)
    viewer = watch(topic="area/0/device-0")
    viewer.last("messages", bool)
    viewer.last("pipeline", lambda p: p["now"] > viewer.all("pipeline")[0]["now"] + 1)
    database.query(
        "INSERT INTO messages (received_at, topic, payload, qos, retained)"
        " VALUES (now() - interval '5 s', 'area/0/device-0', 'late', 1, false)"
    )
    viewer.last("messages", lambda new: [m["payload"] for m in new] == ["bGF0ZQ=="])


def test_many_readings_are_sampled(collector: Collector, database: Database) -> None:
    fill(database, 10)
    status, _, body = get(collector, "/explorer/readings?topic=area/0/device-3&seconds=3600")
    found = json.loads(body)
    assert (status, found["sampled"], found["messages"]) == (200, False, 1)
    [[_, value]] = found["series"]["n"]
    assert value == 1

    database.query(
        "INSERT INTO messages (received_at, topic, payload, fields, qos, retained) VALUES"
        " (now(), 'a/nested', '', '{\"b\": {\"c\": [1, true, \"x\"]}}', 1, false),"
        " (now(), 'a/array', '', '[{\"v\": 2}]', 1, false), (now(), 'a/single', '', '3', 1, false)"
    )
    for topic, name, value in (
        ("nested", "b.c[0]", 1),
        ("array", "[0].v", 2),
        ("single", "single", 3),
    ):
        body = get(collector, f"/explorer/readings?topic=a/{topic}&seconds=60")[2]
        series = json.loads(body)["series"]
        assert {name: points[0][1] for name, points in series.items()} == {name: value}

    database.query(
        "INSERT INTO messages (received_at, topic, payload, fields, qos, retained)"
        " SELECT now() - i * interval '1 s', 'busy', 'x', jsonb_build_object('n', i), 1, false"
        " FROM generate_series(1, 3000) i"
    )
    found = json.loads(get(collector, "/explorer/readings?topic=busy&seconds=3600")[2])
    assert found["sampled"]
    points = found["series"]["n"]
    assert 190 <= len(points) <= 201  # 3000 s in steps of 15 s
    now = time.time()
    for at, mean, least, most in points:
        assert least <= mean <= most <= least + 8
        assert abs(now - at - mean) < 30  # each value is its own age in seconds


def test_older_messages_are_returned_in_pages(collector: Collector, database: Database) -> None:
    database.query(
        "INSERT INTO messages (received_at, topic, payload, qos, retained)"
        " SELECT to_timestamp(extract(epoch FROM date_trunc('hour', now())) + i), 't',"
        " 'x', 1, false FROM generate_series(1, 120) i"
    )
    newest = json.loads(get(collector, "/explorer/messages?topic=t&before=3e9")[2])[0]["at"]
    older = json.loads(get(collector, f"/explorer/messages?topic=t&before={newest}")[2])
    assert [m["at"] for m in older] == [newest - n for n in range(1, 51)]


def test_large_messages_are_truncated(
    watch: Callable[..., Viewer], broker: Mosquitto, collector: Collector
) -> None:
    wide = json.dumps({f"key{n}": "x" * 100 for n in range(1000)}).encode()
    publish(broker, [("t/<script>", b"y" * (128 << 10)), ("t/wide", wide)])
    collector.wait_settled(2)
    for topic, size in (("t/<script>", 128 << 10), ("t/wide", len(wide))):
        viewer = watch(topic, open=["t/"], topic=topic)
        [message] = viewer.last("messages", bool)
        assert message["size"] == size
        assert len(message["payload"]) < 6_000
        assert message["fields"] is None
        assert all(len(json.dumps(entry)) < 300 for entry in viewer.last("latest"))


def test_dead_letters_of_both_tables_are_shown(
    watch: Callable[..., Viewer], broker: Mosquitto, collector: Collector, database: Database
) -> None:
    database.query("ALTER TABLE messages ADD CHECK (payload <> 'bad')")
    publish(broker, [("t", b"bad")])
    database.query("ALTER TABLE dead_letters ADD CHECK (payload <> 'worse')")
    database.query("ALTER TABLE messages ADD CHECK (payload <> 'worse')")
    publish(broker, [("t", b"worse")])
    collector.wait_settled(2)
    letters = watch().last("dead_letters", lambda letters: len(letters) == 2)
    assert [(letter["table"], letter["payload"]) for letter in letters] == [
        ("dead_letters_fallback", "d29yc2U="),
        ("dead_letters", "YmFk"),
    ]
    assert "violates check constraint" in letters[0]["reason"]


def test_database_outage_is_shown_until_it_ends(
    make_collector: Callable[..., Collector],
    broker: Mosquitto,
    own_database: Database,
    own_postgres: Postgres,
) -> None:
    collector = make_collector(broker, own_database).start()
    publish(broker, [("a/b", b"n:1")])
    collector.wait_settled(1)
    viewer = Viewer(collector, open=["a/"])
    viewer.last("latest")
    own_postgres.stop()
    began = time.monotonic()
    viewer.last("database", lambda d: d["error"])
    assert time.monotonic() - began < 5
    viewer.last("pipeline", lambda p: p["health"]["problems"])
    # A viewer that connects during the outage gets the last known topics.
    late = Viewer(collector, "late", open=["a/"])
    assert late.last("tree")["topics"] == 1
    assert late.last("database")["error"]
    own_postgres.start()
    viewer.last("database", lambda d: d["error"] is None)
    publish(broker, [("a/c", b"n:2")])
    late.last("latest", lambda latest: any(entry[0] == "a/c" for entry in latest))
    viewer.close()
    late.close()


def test_hanging_database_delays_neither_probes_nor_state(
    make_collector: Callable[..., Collector],
    broker: Mosquitto,
    own_database: Database,
    own_postgres: Postgres,
) -> None:
    collector = make_collector(broker, own_database).start()
    viewer = Viewer(collector)
    viewer.last("activity")
    backend = own_database.query(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'iot-collector explorer'"
    )[0][0]
    subprocess.run(["kill", "-STOP", str(backend)], check=True)
    try:
        viewer.last("database", lambda d: d["error"])
        count = len(viewer.all("pipeline"))
        eventually(lambda: len(viewer.all("pipeline")) > count + 1)
        assert collector.get("/livez").status == 200
    finally:
        subprocess.run(["kill", "-CONT", str(backend)], check=True)
    viewer.last("database", lambda d: d["error"] is None)
    viewer.close()


# Many topics ---------------------------------------------------------------------------------


def test_many_topics_are_listed_in_parts(database: Database) -> None:
    fill(database, 12_000)
    reader = Reader(settings_of(database))
    topics = Topics(reader)
    while not topics.complete:
        topics.refresh()
    assert len(topics.names) == 12_000
    assert topics.names == sorted(topics.names)
    nodes, left_out = topics.children("", 200)
    assert [(n["path"], n["below"], n["topic"]) for n in nodes] == [("area", 12_000, None)]
    nodes, left_out = topics.children("area/", 50)
    assert (len(nodes), left_out) == (50, 70)
    nodes, _ = topics.children("area/7/", 200)
    assert len(nodes) == 100
    assert all(node["topic"] == node["path"] and not node["below"] for node in nodes)
    nodes, left_out = topics.search("DEVICE-777", 50)
    assert [node["path"] for node in nodes] == [
        "area/7/device-777",
        *(f"area/77/device-777{n}" for n in range(10)),
    ]
    assert not left_out
    reader.close()


@pytest.mark.parametrize(
    ("names", "prefix", "expected"),
    [
        (["a", "a b", "a/b", "a/c"], "", [("a", "a", 2), ("a b", "a b", 0)]),
        (["/a", "//b", "x/"], "", [("", None, 2), ("x", "x/", 0)]),
        (["/a", "//b"], "/", [("/", "//b", 0), ("/a", "/a", 0)]),
        (["a/b/c/d"], "", [("a", "a/b/c/d", 0)]),
        (["a/0", "a0", "a/é/x", "a/é/y"], "a/", [("a/0", "a/0", 0), ("a/é", None, 2)]),
    ],
)
def test_tree_of_unusual_topic_names(
    database: Database, names: list[str], prefix: str, expected: list[tuple[str, str | None, int]]
) -> None:
    topics = Topics(Reader(settings_of(database)))
    topics.names, topics.last = sorted(names), dict.fromkeys(names, 1.0)
    nodes, left_out = topics.children(prefix, 10)
    assert [(n["path"], n["topic"], n["below"]) for n in nodes] == expected
    assert left_out == 0


def test_topic_list_reads_one_row_for_each_topic(database: Database) -> None:
    """It skips through the index (loose index scan), so that it can be read all the time."""
    fill(database, 50)
    database.query(
        "INSERT INTO messages (received_at, topic, payload, qos, retained)"
        " SELECT now() - i * interval '1 ms', 'busy/' || i % 2, 'x', 1, false"
        " FROM generate_series(1, 20000) i"
    )
    database.query("ANALYZE messages")
    values = {"after": "", "oldest": oldest(), "limit": 5_000}
    with contextlib.closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + queries.TOPICS, values)
        [[plan]] = cursor.fetchall()
    text = json.dumps(plan)
    rows = [int(float(n)) for n in re.findall(r'"Actual Rows": ([0-9.]+)', text)]
    assert "Seq Scan" not in text
    assert max(rows) <= 52


# Privileges and limits -----------------------------------------------------------------------


def test_connection_is_read_only_and_has_a_statement_timeout(database: Database) -> None:
    reader = Reader(settings_of(database))
    with pytest.raises(UnavailableError, match="read-only"):
        reader.ask("INSERT INTO dead_letters DEFAULT VALUES RETURNING 1", {})
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="more than 2 s"):
        reader.ask("SELECT pg_sleep(60)", {})
    assert time.monotonic() - began < 20
    assert reader.ask("SELECT %(one)s", {"one": 1}) == [(1,)]
    reader.close()


def test_explorer_uses_its_own_role(
    make_collector: Callable[..., Collector], broker: Mosquitto, database: Database, tmp_path: Path
) -> None:
    role = f"reader_{database.name}"
    database.query(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
    database.query(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    password = tmp_path / "password"
    password.write_text("secret\n")
    collector = make_collector(
        broker,
        database,
        IOT_LIVE_PAGE_DATABASE_URL=database.url.replace("postgres@", f"{role}@"),
        IOT_LIVE_PAGE_DATABASE_PASSWORD_FILE=str(password),
    ).start()
    viewer = Viewer(collector)
    assert viewer.last("tree")["complete"]
    users = database.query(
        "SELECT usename FROM pg_stat_activity WHERE application_name = 'iot-collector explorer'"
    )
    assert users == [(role,)]
    viewer.close()
    database.query(f"REVOKE SELECT ON messages FROM {role}")
    late = Viewer(collector, "late")
    assert "permission denied" in late.last("database")["error"]
    late.close()


def test_database_connection_is_open_only_with_viewers(
    watch: Callable[..., Viewer], database: Database
) -> None:
    def connections() -> int:
        [[count]] = database.query(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = 'iot-collector explorer'"
        )
        return int(count)

    assert connections() == 0
    viewer = watch()
    viewer.last("activity")
    assert connections() == 1
    viewer.close()
    eventually(lambda: connections() == 0, what="the connection is closed")


# Access --------------------------------------------------------------------------------------


def test_number_of_viewers_is_limited(watch: Callable[..., Viewer], collector: Collector) -> None:
    viewers = [watch(f"viewer-{n}") for n in range(VIEWERS)]
    for viewer in viewers:
        viewer.last("pipeline")
    ninth = watch("ninth")
    assert ninth.answer.status == 503
    assert "already open 8 times" in json.loads(ninth.answer.read())["error"]
    assert collector.get("/readyz").status == 200
    # A viewer that connects again does not count twice, and its first stream ends.
    again = watch("viewer-0")
    assert again.answer.status == 200
    assert viewers[0].ended.wait(30)
    viewers[1].close()
    eventually(lambda: watch("ninth").answer.status == 200, what="another viewer is admitted")


def answer(settings: Settings, path: str, body: bytes | None = None, **headers: str) -> Answer:
    """Call the WSGI application without a server; return status, headers and body."""
    environ: dict[str, Any] = {"REQUEST_METHOD": "GET" if body is None else "POST"}
    environ["PATH_INFO"], _, environ["QUERY_STRING"] = path.partition("?")
    environ["CONTENT_TYPE"] = headers.pop("content_type", "application/json")
    environ["wsgi.input"] = io.BytesIO(body or b"")
    setup_testing_defaults(environ)
    environ |= {f"HTTP_{name.upper()}": value for name, value in headers.items()}
    responses: list[tuple[int, dict[str, str]]] = []

    def start(status: str, found: list[tuple[str, str]], _: Any = None) -> Callable[..., object]:
        responses.append((int(status[:3]), {name.lower(): value for name, value in found}))
        return responses.append

    content: Any = Explorer(settings, dict)(environ, start)
    [[status, found]] = responses
    if isinstance(content, list):
        return status, found, b"".join(content)
    content.close()  # a stream
    return status, found, b""


VIEW = json.dumps({"viewer": "x", "open": [""]}).encode()


@pytest.mark.parametrize(
    ("host", "setting", "page"),
    [
        ("127.0.0.1", None, "explorer"),
        ("::1", None, "explorer"),
        ("localhost", None, "explorer"),
        ("0.0.0.0", None, "metrics"),
        ("iot.example", None, "metrics"),
        ("127.0.0.1", "metrics", "metrics"),
        ("0.0.0.0", "full", "explorer"),
        ("127.0.0.1", "off", None),
    ],
)
def test_live_page_depends_on_address_and_setting(
    host: str, setting: Any, page: str | None
) -> None:
    settings = Settings(http_host=host, live_page=setting)
    status, headers, body = answer(settings, "/")
    assert status == (200 if page else 404)
    if page:
        assert f"explorer/assets/{page}.js".encode() in body
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    expected = 200 if page == "explorer" else 404
    assert answer(settings, "/explorer/stream", VIEW)[0] == expected
    if page != "explorer":
        assert answer(settings, "/explorer/search?text=a")[0] == 404
        assert answer(settings, "/explorer/readings?topic=a&seconds=60")[0] == 404


def test_requests_of_other_sites_are_refused() -> None:
    settings = Settings(live_page_hosts=["iot.example"])
    path = "/explorer/search?text=a"
    for name in ("localhost:3000", "127.0.0.1:3000", "[::1]:80", "iot.example", "LOCALHOST"):
        assert answer(settings, path, host=name)[0] == 200, name
    for name in ("evil.example", "evil.example:80", "localhost.evil.example", "[", "", "10.0.0.1"):
        assert answer(settings, path, host=name)[0] == 403, name
        assert answer(settings, "/explorer/stream", VIEW, host=name)[0] == 403, name
    # On an address that other machines reach, any host name is accepted.
    assert answer(Settings(http_host="::", live_page="full"), path, host="any.example")[0] == 200
    assert answer(settings, path, host="localhost", sec_fetch_site="cross-site")[0] == 403
    assert answer(settings, path, host="localhost", sec_fetch_site="same-origin")[0] == 200
    _, headers, _ = answer(settings, path, host="localhost", origin="http://evil.example")
    assert not [name for name in headers if name.startswith("access-control")]
    # A form of another site can only send content types like text/plain.
    form = answer(settings, "/explorer/stream", VIEW, content_type="text/plain", host="localhost")
    assert form[0] == 415


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/explorer/stream", b""),
        ("/explorer/stream", b"[]"),
        ("/explorer/stream", b"{}"),
        ("/explorer/stream", b'{"viewer": "", "open": []}'),
        ("/explorer/stream", b'{"viewer": "x", "open": ["a\\u0000"]}'),
        ("/explorer/stream", json.dumps({"viewer": "x", "open": [""] * 41}).encode()),
        ("/explorer/messages?topic=a", None),
        ("/explorer/messages?topic=%00&before=1", None),
        ("/explorer/messages?topic=a&before=x", None),
        ("/explorer/readings?topic=a&seconds=inf", None),
        ("/explorer/readings?topic=a&seconds=nan", None),
        ("/explorer/readings?topic=a&seconds=1e9", None),
        ("/explorer/search", None),
    ],
)
def test_invalid_requests_are_refused(path: str, body: bytes | None) -> None:
    status, _, content = answer(Settings(), path, body, host="localhost")
    assert status == 400
    assert json.loads(content)["error"]


def test_only_assets_are_served() -> None:
    for path in ("../web.py", "..%2fweb.py", "explorer.html/..", "vendor", "uPlot-LICENSE", ""):
        assert answer(Settings(), f"/explorer/assets/{path}", host="localhost")[0] == 404, path
    status, headers, _ = answer(Settings(), "/explorer/assets/style.css")
    assert (status, headers["content-type"]) == (200, "text/css; charset=utf-8")
    assert headers["x-content-type-options"] == "nosniff"
    tag = headers["etag"]
    assert answer(Settings(), "/explorer/assets/style.css", if_none_match=tag)[::2] == (304, b"")


# The files -----------------------------------------------------------------------------------


def test_pages_have_no_inline_code_and_no_external_links() -> None:
    for page in ASSETS.glob("*.html"):
        text = page.read_text()
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|javascript:", text)
        links = re.findall(r'(?:src|href)="([^"]*)"', text)
        assert links
        for link in links:
            # Relative links also work behind a reverse proxy with a path prefix.
            assert not re.match(r"/|\w+:", link)
            if link not in ("metrics", "health"):
                assert (ASSETS / link.removeprefix("explorer/assets/")).is_file()
    for script in ASSETS.glob("*.js"):
        text = script.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert not re.search(r"""https?://(?!www\.w3\.org/2000/svg)|fetch\(["'`]/""", text)


def test_assets_are_small_and_licensed() -> None:
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(len(gzip.compress(file.read_bytes())) for file in files) <= 150_000
    assert "Permission is hereby granted" in (ASSETS / "vendor/uPlot-LICENSE").read_text()


def test_wheel_contains_the_assets(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        f"--wheel-dir={tmp_path}",
    ]
    subprocess.run([*command, str(ROOT)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"iot_collector/explorer/assets/{file.relative_to(ASSETS)}"
        for file in ASSETS.rglob("*")
        if file.is_file()
    }
    assert expected
    assert expected <= names
