"""Hostile programs: none gets out, none goes on, none costs more than its limits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlsys.config.errors import UserError
from rlsys.rewards import seccomp
from rlsys.rewards.sandbox import Limits, Outcome, check_namespaces, run_program

MARK = 1_000_000 + os.getpid()  # a limit that nothing meets: in the command line of every process of a sandbox
LIMITS = Limits(seconds=0.6, cpu_seconds=MARK, memory_mib=128, processes=8, scratch_mib=8, file_mib=4, output_kib=32)
SLACK_S = 6.0  # on a machine that runs other tests too


pytestmark = pytest.mark.usefixtures("namespaces")


class Host:
    """What a program must not reach: a secret file, a server, a process."""

    def __init__(self, folder: Path):
        self.secret = folder / "secret.txt"
        self.secret.write_text("canary", encoding="utf-8")
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.calls = 0
        self.victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                self.server.accept()
            except OSError:
                return
            self.calls += 1

    def untouched(self) -> bool:
        return self.secret.read_text(encoding="utf-8") == "canary" and not self.calls and self.victim.poll() is None

    def close(self) -> None:
        self.server.close()
        self.victim.kill()
        self.victim.wait()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    found = Host(tmp_path_factory.mktemp("host"))
    yield found
    found.close()


GOT_OUT = "GOT OUT"
_SECTIONS = (Path(__file__).parent / "hostile_programs.txt").read_text(encoding="utf-8").split("\n## ")[1:]
HOSTILE = dict(section.split("\n", 1) for section in _SECTIONS)


def left_behind() -> list[int]:
    """Processes of sandboxes, whoever adopted them. One that ended by itself takes the others along a moment later."""
    deadline = time.monotonic() + SLACK_S
    while found := [p.pid for p in psutil.process_iter() if str(MARK) in " ".join(_command(p))]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_process_that_is_left_behind_would_be_found() -> None:
    started = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(60) # {MARK}"])
    try:
        assert any(str(MARK) in " ".join(_command(p)) for p in psutil.process_iter())
    finally:
        started.kill()
        started.wait()
    assert not left_behind()


def run(source: str, host: Host) -> Outcome:
    filled = (
        source.replace("SECRET", str(host.secret))
        .replace("PORT", str(host.port))
        .replace("VICTIM", str(host.victim.pid))
        .replace("PROJECT", str(Path(__file__).parents[2]))
    )
    return run_program(f"def out(): print({GOT_OUT[:3]!r} + {GOT_OUT[3:]!r})\n{filled}\n", limits=LIMITS)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_gets_nowhere(name: str, host: Host) -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    started = time.monotonic()
    outcome = run(HOSTILE[name], host)
    assert time.monotonic() - started < LIMITS.seconds + SLACK_S
    assert GOT_OUT not in outcome.stdout, outcome
    assert len(outcome.stdout) + len(outcome.stderr) <= 2 * LIMITS.output_kib << 10
    assert host.untouched()
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before, "something outlived its program"
    assert not left_behind()
    assert not Path("/tmp/left").exists()


def test_the_next_program_finds_nothing_of_the_last(host: Host) -> None:
    for _ in range(2):
        outcome = run("open('/tmp/left', 'x').write('x'); print('alone')", host)
        assert outcome.stdout == "alone\n", outcome


@pytest.mark.parametrize(
    ("source", "ending"),
    [
        ("while True: pass", "timeout"),
        ("import os\nwhile True: os.fork()", "processes"),
        (
            "import threading, time\nthreading.stack_size(32768)\n"
            "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
            "processes",
        ),
        (
            "import os, time\nfor _ in range(4):\n  if os.fork() == 0: break\nx = bytearray(60 << 20); time.sleep(60)",
            "memory",
        ),
        ("while True: print('x' * 10000)", "output"),
        ("import os; os.abort()", "signal"),
        ("raise SystemExit(3)", "exited"),
    ],
)
def test_how_a_program_ended_is_said(source: str, ending: str, host: Host) -> None:
    assert run(source, host).ending == ending


def test_a_harmless_program_reads_prints_and_writes(host: Host) -> None:
    source = "import tempfile\nwith tempfile.TemporaryFile('w+') as f: f.write(input()); f.seek(0); print(f.read())"
    outcome = run_program(source, stdin="ä line\n", limits=LIMITS)
    assert (outcome.ok, outcome.stdout, outcome.stderr) == (True, "ä line\n", "")


def test_a_long_input_and_a_program_that_does_not_read_it(host: Host) -> None:
    text = "x" * (1 << 20)
    assert run_program("import sys; print(len(sys.stdin.read()))", stdin=text, limits=LIMITS).stdout == f"{len(text)}\n"
    assert run_program("print('no')", stdin=text, limits=LIMITS).stdout == "no\n"


def test_limits_alone_are_a_choice_and_hold_too(host: Host) -> None:
    outcome = run_program(f"print(open('{host.secret}').read())", limits=LIMITS, isolation="limits")
    assert outcome.stdout == "canary\n", "without namespaces a program reads what its user may read"
    assert run_program("while True: pass", limits=LIMITS, isolation="limits").ending == "timeout"
    outcome = run_program("x = []\nwhile True: x.append(bytearray(1 << 20))", limits=LIMITS, isolation="limits")
    assert outcome.ending == "memory" or "MemoryError" in outcome.stderr


def running(caller: int) -> bool:
    """Whether a program of its has come as far as its interpreter."""
    commands = [_command(p) for p in psutil.Process(caller).children(recursive=True)]
    return any(str(MARK) in words[-1] and words[0] not in ("bwrap", "setpriv") for words in commands if words)


@pytest.mark.parametrize("isolation", ["namespaces", "limits"])
def test_a_killed_caller_takes_its_program_along(isolation: str) -> None:
    code = (
        "from rlsys.rewards.sandbox import Limits, run_program\n"
        f"run_program('import time; time.sleep(600)', limits=Limits(seconds=600, cpu_seconds={MARK}), "
        f"isolation={isolation!r})"
    )
    caller = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not running(caller.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)  # its interpreter has begun by now
    finally:
        caller.kill()
        caller.wait()
    assert not left_behind()


def test_a_machine_whose_calls_are_not_known_runs_nothing() -> None:
    assert len(seccomp.program("aarch64")) == len(seccomp.program("x86_64"))
    with pytest.raises(UserError, match="riscv64"):
        seccomp.program("riscv64")


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check_namespaces.cache_clear()
    try:
        with pytest.raises(UserError, match="not installed") as error:
            run_program("print('hello')")
    finally:
        check_namespaces.cache_clear()
    assert "apt install bubblewrap" in str(error.value.fix)
    assert os.environ["PATH"] == str(tmp_path)
