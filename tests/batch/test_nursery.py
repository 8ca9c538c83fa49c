"""Children of a nursery: born quickly, alone at work, and dead as soon as nobody waits for them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.batch import nursery
from engine.batch.nursery import Child, LostChildError, folder_of
from engine.errors import StorageError


@pytest.fixture
def home(tmp_path) -> Iterator[Path]:
    """A server's folder; the server ends by itself, or with the children that a test has left."""
    folder = tmp_path / "nursery"
    folder.mkdir(mode=0o700)
    yield folder
    for process in psutil.process_iter():
        if any(str(folder) in part for part in command_line(process)):
            process.kill()


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def ended(pid: int, *, within_s: float = 10) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_children_answer_raise_die_and_are_replaced(home):
    first, second = Child(home), Child(home)
    pid = second.ask("os:getpid")
    assert len({first.ask("os:getpid"), pid, os.getpid()}) == 3
    with pytest.raises(ZeroDivisionError):
        first.ask("operator:truediv", 1, 0)
    assert first.ask("operator:truediv", 6, 3) == 2  # an error of the work is no death
    loaded = first.ask("builtins:eval", "'torch' in __import__('sys').modules")
    assert loaded
    with pytest.raises(LostChildError):
        first.ask("os:kill", first.ask("os:getpid"), signal.SIGSEGV)
    with pytest.raises(LostChildError):
        first.ask("os:getpid")
    assert second.ask("os:getpid") == pid
    for child in (first, second):
        child.close()


def test_a_child_sees_the_gpus_of_the_process_that_it_works_for(home, monkeypatch):
    other = Child(home)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    one = Child(home)
    assert one.ask("os:getenv", "CUDA_VISIBLE_DEVICES") == "3"
    assert other.ask("os:getenv", "CUDA_VISIBLE_DEVICES") is None
    one.close()
    other.close()


OWNER = """
import sys
from collections.abc import Iterator
from pathlib import Path
from engine.batch.nursery import Child
child = Child(Path(sys.argv[1]), *sys.argv[3:])
print(child.ask("os:getpid"), flush=True)
if sys.argv[2] == "4 s":
    child.ask("builtins:exec", "import os, time; time.sleep(4); os.environ['SLEPT'] = '4 s'")
child.ask("time:sleep" if sys.argv[2] == "sleep" else "builtins:eval", 600 if sys.argv[2] == "sleep" else "9 ** 9 ** 9")
"""


@pytest.mark.parametrize("work", ["sleep", "a loop in C that never lets go"])
def test_a_child_ends_with_the_process_that_waits_for_it(home, work):
    Child(home).close()  # the server is there
    with subprocess.Popen([sys.executable, "-c", OWNER, str(home), work], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        time.sleep(0.5)  # it is at work
        assert psutil.pid_exists(child)
        owner.send_signal(signal.SIGKILL)
    assert ended(child)


def at_work_without_owner(home: Path, *name: str) -> int:
    """The process id of a child that sleeps, and whose owner was killed."""
    command = [sys.executable, "-c", OWNER, str(home), "4 s", *name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        time.sleep(0.5)
        owner.kill()
    return child


def test_an_orphan_goes_on_with_its_work_for_the_next_of_its_name(home):
    Child(home).close()
    pid = at_work_without_owner(home, "actor 7")
    other = Child(home, "actor 8")
    assert other.ask("os:getpid") != pid
    with subprocess.Popen([sys.executable, "-c", OWNER, str(home), "sleep", "actor 7"]) as owner:
        time.sleep(1.5)
        owner.kill()  # waits for the child, which still is at work
    mine = Child(home, "actor 7")
    assert mine.ask("os:getpid") == pid
    assert mine.ask("os:getenv", "SLEPT") == "4 s"
    mine.close()
    other.close()
    assert ended(pid, within_s=2)  # it was not at work


def test_the_server_outlives_the_process_group_of_the_one_that_started_it(home):
    starter = [sys.executable, "-c", OWNER, str(home), "4 s", "actor 7"]
    with subprocess.Popen(starter, stdout=subprocess.PIPE, text=True, start_new_session=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        other = Child(home)
        os.killpg(owner.pid, signal.SIGKILL)  # as Ray's raylet ends its workers
    mine = Child(home, "actor 7")
    assert mine.ask("os:getpid") == pid
    assert other.ask("operator:add", 1, 1) == 2
    mine.close()
    other.close()


def test_a_server_that_is_killed_is_replaced_while_its_children_live(home):
    one = Child(home)
    server = psutil.Process(one.ask("os:getpid")).parent()
    assert server is not None
    server.kill()
    server.wait()
    other = Child(home)
    assert other.ask("operator:add", 1, 1) == 2
    assert one.ask("operator:add", 2, 1) == 3
    one.close()
    other.close()


def test_an_orphan_that_sees_other_gpus_is_not_adopted(home, monkeypatch):
    Child(home).close()
    pid = at_work_without_owner(home, "actor 7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    mine = Child(home, "actor 7")
    assert mine.ask("os:getpid") != pid
    mine.close()


def test_an_orphan_that_nobody_adopts_ends(home):
    program = f"from engine.batch import nursery; nursery.ADOPTION_S = 1.0; nursery.serve({str(home)!r})"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert ended(at_work_without_owner(home, "actor 7"), within_s=1.8)


def test_a_child_that_is_stopped_is_lost(home):
    child = Child(home)
    os.kill(child.ask("os:getpid"), signal.SIGSTOP)
    with pytest.raises(LostChildError):
        child.ask("os:getpid", timeout_s=30)
    child.close()


def test_time_out(home):
    child = Child(home)
    pid = child.ask("os:getpid")
    with pytest.raises(TimeoutError):
        child.ask("time:sleep", 600, timeout_s=0.2)
    child.close()
    assert ended(pid)


def test_a_server_that_was_killed_is_replaced(home):
    Child(home).close()
    running = [process for process in psutil.process_iter() if is_server(process, home)]
    (server,) = (process for process in running if process.ppid() not in {one.pid for one in running})  # no child of it
    server.kill()
    assert ended(server.pid)
    child = Child(home)
    assert child.ask("operator:add", 1, 1) == 2
    child.close()


def test_a_server_without_children_ends_and_leaves_nothing(home, tmp_path):
    program = (
        "from engine.batch import nursery; nursery.IDLE_S = 0.5; nursery._LOADED = 'json'; "
        f"nursery.serve({str(home)!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    until = time.monotonic() + 30
    while home.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not home.exists()


def is_server(process: psutil.Process, home: Path) -> bool:
    line = command_line(process)
    return "-c" in line and any("nursery.serve" in part and str(home) in part for part in line)


def test_a_folder_of_somebody_else_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(nursery.tempfile, "tempdir", str(tmp_path))
    folder = folder_of("a" * 56)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(StorageError, match="remove it"):
        folder_of("a" * 56)
