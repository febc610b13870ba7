"""``iot-collector top`` with a real collector, printed once and in a terminal."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Callable
from typing import Self

import pytest

from testing.collector import Collector, clean_environment, iot_collector, run_command
from testing.mosquitto import Mosquitto
from testing.postgres import Database
from testing.publisher import publish
from testing.service import PATIENCE, binary, eventually, free_port

# Brokers refuse control characters in topics. JSON escapes can put them into fields.
HOSTILE_TOPIC = "hostile/[red]x[/red]\u202e"
HOSTILE = "[b]y[/b]\x1b[31m\x1b]0;owned\x07\u202e"
HOSTILE_SHOWN = re.compile(
    r"hostile/\[red\]x\[/red\]⟨202E⟩ +\[b\]y\[/b\]⟨001B⟩\[31m⟨001B⟩\]0;owned⟨0007⟩⟨202E⟩"
)


def top(collector: Collector, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command("top", *arguments, IOT_HTTP_PORT=collector.settings["IOT_HTTP_PORT"])


class Terminal:
    """A terminal of 100 columns and 24 lines that runs `iot-collector top`."""

    def __init__(self, collector: Collector, *arguments: str) -> None:
        self._terminal, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        size = ("COLUMNS", "LINES", "NO_COLOR")
        environment = {k: v for k, v in clean_environment().items() if k not in size}
        environment |= {
            "TERM": "xterm-256color",
            "IOT_HTTP_PORT": collector.settings["IOT_HTTP_PORT"],
        }
        # Ctrl-C sends a signal only in a session with this controlling terminal.
        self.process = subprocess.Popen(
            [binary("setsid"), "--ctty", iot_collector(), "top", *arguments],
            env=environment,
            stdin=inside,
            stdout=inside,
            stderr=inside,
        )
        os.close(inside)
        self._seen = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while read := os.read(self._terminal, 65536):
                self._seen += read
        except OSError:  # the program has ended
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        os.close(self._terminal)

    def text(self) -> str:
        return self._seen.decode(errors="replace")

    def wait_for(self, pattern: str) -> None:
        """Wait until new output matches a pattern."""
        start = len(self.text())
        what = f"{pattern} on the terminal"
        eventually(lambda: re.search(pattern, self.text()[start:]), what=what)

    def press(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def end(self) -> tuple[int, str]:
        """Wait until the program ends; return its exit status and all output."""
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status, self.text()


@pytest.fixture
def filled(broker: Mosquitto, collector: Collector) -> Collector:
    """A collector that has stored messages of five topics."""
    messages = [("plant/1/temperature", b"temperature:%d" % n) for n in (21, 22, 23)]
    messages += [("plant/2/temperature", b"19.5"), ("plant/2/humidity", b'{"humidity": 45}')]
    messages += [(HOSTILE_TOPIC, json.dumps({"text": HOSTILE}).encode()), ("office/door", b"open")]
    publish(broker, messages)
    collector.wait_settled(len(messages))
    return collector


def test_once_prints_the_state_and_the_topics(filled: Collector) -> None:
    done = top(filled, "--once")
    assert (done.returncode, done.stderr) == (0, "")
    first, *_, about = done.stdout.splitlines()[:4]
    assert first == "Every message is being stored"
    assert about == "5 topics of all collectors, by rate"
    assert "7 stored of 7 received" in done.stdout
    row = re.search(r"^ +(\d+) +(\S+) +[\w ]+?  (\S+) +23$", done.stdout, re.M)
    assert row, done.stdout
    assert row.groups() == ("3", "3/min", "plant/1/temperature")
    assert HOSTILE_SHOWN.search(done.stdout)
    assert all(line.isprintable() for line in done.stdout.splitlines())

    # By filter; as a tree.
    done = top(filled, "--once", "--sort", "topic", "plant/+/temperature")
    shown = done.stdout[done.stdout.index("TOPIC") :]
    assert re.search(r"  plant/\n.*    1/temperature  23\n.*    2/temperature  19.5\n$", shown), (
        shown
    )
    assert "No topic matches" in top(filled, "nothing/#").stdout


def test_terminal_is_updated_and_reacts_to_keys(filled: Collector, broker: Mosquitto) -> None:
    with Terminal(filled, "--interval", "0.2") as terminal:
        terminal.wait_for(r"3/min .*plant/1/temperature.* 23 ")
        publish(broker, [("plant/1/temperature", b"temperature:1234")])
        terminal.wait_for(r"4/min .*plant/1/temperature.* 1234 ")
        terminal.press(b"t")
        terminal.wait_for("by topic")
        terminal.press(b"/office/#\r")
        terminal.wait_for("1 topic of all collectors matching office/#, by topic")
        filled.kill()
        terminal.wait_for("No connection to the collector")
        filled.start()
        terminal.wait_for("Every message is being stored")
        terminal.press(b"\x03")
        status, text = terminal.end()
    assert status == 0, text[-2000:]
    assert "Traceback" not in text
    assert text.startswith("\x1b[?1049h")  # alternate screen, left at the end
    assert text.rstrip().endswith("\x1b[?25h\x1b[?1049l") or "\x1b[?1049l" in text[-40:]
    # Apart from screen control and colours, all output is printable text.
    rest = re.sub(r"\x1b\[(\?1049[hl]|\?25[hl]|[0-9;]*[mHAK])|[\r\n]", "", text)
    assert rest.isprintable()
    assert HOSTILE_SHOWN.search(rest)


def test_errors_are_explained_in_one_line(
    make_collector: Callable[..., Collector], broker: Mosquitto, database: Database
) -> None:
    collector = make_collector(broker)  # the database cannot be reached
    collector.settings |= {"IOT_DATABASE_URL": f"postgresql://127.0.0.1:{free_port()}/iot"}

    def error_line(*arguments: str) -> str:
        done = top(collector, *arguments)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        return line

    url = f"http://127.0.0.1:{collector.settings['IOT_HTTP_PORT']}"
    assert f"no collector answers at {url} (Connection refused)" in error_line()
    for mode in ("metrics", "off"):
        collector.settings["IOT_LIVE_PAGE"] = mode
        collector.launch().wait_listening()
        assert re.search(
            f"the collector at {url} refuses the request: .*IOT_LIVE_PAGE.*; set IOT_LIVE_PAGE=",
            error_line(),
        )
        collector.kill()
    collector.settings["IOT_LIVE_PAGE"] = "full"
    collector.launch().wait_listening()
    assert "HTTP status 404" in error_line("--url", f"{url}/elsewhere/")
    assert "--url" in error_line("--url", f"http://127.0.0.1:{broker.port}")
    assert "the topics cannot be read: " in error_line("--once")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--url", "127.0.0.1:3000"], "--url"),
        (["plant/#/x"], "FILTER"),
        (["--interval", "soon"], "--interval"),
        (["--sort", "name"], "--sort"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], named: str) -> None:
    done = run_command("top", *arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
