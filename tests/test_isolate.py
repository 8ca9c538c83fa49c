"""A crash, a hang or a flood of memory in a decoder costs one file and a few milliseconds."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from engine import isolate
from engine.errors import DecoderCrashed, DecoderOutOfMemory, DecoderTimeout, UnreadableInput
from engine.geometry import Box
from engine.image import decode, probe
from engine.isolate import decode_in_child, in_child, probe_in_child
from engine.warden import Limits

SUBJECT = Path("scan 7.tif")
MIB = 1 << 20


def wait_until(condition, seconds: float = 5) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def server() -> psutil.Process:
    in_child(os.getpid, subject=SUBJECT)
    return psutil.Process(isolate._server._process.pid)


def noise_jpeg(path: Path, side_px: int, *, progressive: bool) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, progressive=progressive)
    return path


def test_a_result_comes_back_from_another_process():
    assert in_child(divmod, 17, 5, subject=SUBJECT) == (3, 2)
    assert in_child(os.getpid, subject=SUBJECT) != os.getpid()


def test_an_exception_comes_back_as_it_was_raised(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(UnreadableInput, match=r"empty\.png: the file is empty \(0 bytes\)"):
        probe_in_child(path)
    with pytest.raises(ValueError, match="invalid literal"):
        in_child(int, "x", subject=SUBJECT)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGTERM])
def test_a_crash_is_typed_and_names_the_file_and_the_signal(number):
    with pytest.raises(DecoderCrashed, match=rf"scan 7\.tif: .*{number.name}.*Save it anew") as raised:
        in_child(signal.raise_signal, number, subject=SUBJECT)
    assert raised.value.code == "decoder-crashed"


def test_an_exit_is_a_crash():
    with pytest.raises(DecoderCrashed, match="exit status 7"):
        in_child(os._exit, 7, subject=SUBJECT)


def test_a_kill_from_outside_counts_as_memory():
    with pytest.raises(DecoderOutOfMemory):
        in_child(signal.raise_signal, signal.SIGKILL, subject=SUBJECT)


def test_a_hang_ends_in_time_and_leaves_no_process():
    parent = server()
    started = time.monotonic()
    with pytest.raises(DecoderTimeout, match=r"scan 7\.tif: not read after 0\.3 s") as raised:
        in_child(time.sleep, 1000, subject=SUBJECT, limits=Limits(timeout_s=0.3))
    assert raised.value.code == "decoder-timeout"
    assert time.monotonic() - started < 2
    assert wait_until(lambda: not parent.children(recursive=True))


def test_a_caller_that_hangs_up_ends_its_worker(monkeypatch):
    parent = server()
    monkeypatch.setattr(isolate, "_GRACE_S", -999.5)  # gives up half a second after the call
    with pytest.raises(DecoderTimeout):
        in_child(time.sleep, 900, subject=SUBJECT, limits=Limits(timeout_s=1000))
    assert wait_until(lambda: not parent.children(recursive=True))


def test_memory_is_capped():
    small = Limits(memory_bytes=64 * MIB)
    assert len(in_child(bytes, 24 * MIB, subject=SUBJECT, limits=small)) == 24 * MIB
    with pytest.raises(DecoderOutOfMemory, match="67,108,864 bytes") as raised:
        in_child(bytes, 80 * MIB, subject=SUBJECT, limits=small)
    assert raised.value.code == "decoder-out-of-memory"


def test_a_decoder_that_wants_too_much_is_out_of_memory_not_damaged(tmp_path):
    """The coefficients of a progressive JPEG lie in memory, 2 bytes each."""
    info = probe(noise_jpeg(tmp_path / "a.jpg", 2400, progressive=True))
    with pytest.raises(DecoderOutOfMemory, match=r"a\.jpg: reading it needs more than"):
        decode_in_child(info, tmp_path / "scratch", limits=Limits(memory_bytes=16 * MIB))
    assert not any((tmp_path / "scratch").rglob("*"))
    decode_in_child(info, tmp_path / "scratch", limits=Limits(memory_bytes=128 * MIB))


def test_a_picture_decoded_in_a_child_is_the_same(tmp_path):
    path = noise_jpeg(tmp_path / "a.jpg", 65, progressive=False)
    info = probe_in_child(path)
    assert info == probe(path)
    ours, theirs = decode(info, tmp_path / "here"), decode_in_child(info, tmp_path / "there")
    assert theirs.sha256 == ours.sha256
    box = Box(3, 2, 64, 65)
    np.testing.assert_array_equal(theirs.read(box), ours.read(box))


def test_two_pictures_share_a_scratch_folder_and_a_broken_one_takes_nothing_with_it(tmp_path):
    good = decode_in_child(probe(noise_jpeg(tmp_path / "a.jpg", 33, progressive=False)), tmp_path / "scratch")
    bad = noise_jpeg(tmp_path / "b.jpg", 200, progressive=False)
    bad.write_bytes(bad.read_bytes()[:9000])
    with pytest.raises(UnreadableInput, match=r"b\.jpg"):
        decode_in_child(probe(bad), tmp_path / "scratch")
    assert good.read(Box(0, 0, 33, 33)).shape == (33, 33, 3)
    assert len(list((tmp_path / "scratch").iterdir())) == 1


def test_no_core_is_dumped():
    import resource

    assert in_child(resource.getrlimit, resource.RLIMIT_CORE, subject=SUBJECT) == (0, 0)


def test_a_call_costs_milliseconds():
    server()
    seconds = []
    for _ in range(15):
        started = time.monotonic()
        in_child(os.getpid, subject=SUBJECT)
        seconds.append(time.monotonic() - started)
    assert sorted(seconds)[len(seconds) // 2] < 0.15  # 8 ms on a free core; a new interpreter takes 500 and more


def test_a_lost_server_is_started_anew():
    process = server()
    process.kill()
    process.wait()
    assert in_child(divmod, 9, 4, subject=SUBJECT) == (2, 1)


def test_threads_call_at_the_same_time():
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(in_child, divmod, number, 7, subject=SUBJECT) for number in range(24)]
        crash = threads.submit(in_child, os.abort, subject=SUBJECT)
        assert [call.result() for call in calls] == [divmod(number, 7) for number in range(24)]
        assert isinstance(crash.exception(), DecoderCrashed)


def test_a_script_without_a_main_guard_may_call_it(tmp_path):
    """It is not run again in the child, and neither what it prints nor its working folder gets in the way."""
    script = tmp_path / "script.py"
    (tmp_path / "numpy.py").write_text("raise SystemExit('the working folder was searched')")
    script.write_text(
        "import sys, os\nsys.path = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]\n"
        "print('once')\nfrom pathlib import Path\nfrom engine.isolate import in_child\n"
        "print(in_child(divmod, 17, 5, subject=Path('x')))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "once\n(3, 2)\n"
    assert done.stderr == ""


@pytest.mark.parametrize("closed", [(2,), (0,), (0, 1, 2), (0, 2)])
def test_a_caller_without_standard_descriptors_is_served(closed, tmp_path):
    """No socket gets the number of a closed one: the worker puts the null device there."""
    said = tmp_path / "said"
    program = (
        f"import os; [os.close(number) for number in {closed}]; import sys; sys.stderr = sys.stdout = None;"
        "from pathlib import Path; from engine.isolate import in_child;"
        f"Path({str(said)!r}).write_text(str([in_child(divmod, 17, number, subject=Path('x')) for number in (5, 4)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], timeout=60, check=False)
    assert (done.returncode, said.exists() and said.read_text()) == (0, "[(3, 2), (4, 1)]")


@pytest.mark.parametrize("started", [False, True])
def test_a_caller_without_a_free_descriptor_is_told(started):
    """Whatever step it is that fails for want of one; and when there are some again, all goes on."""
    program = f"""
import os, resource
from pathlib import Path
from engine.errors import DecoderUnavailable
from engine.isolate import in_child
call = lambda: in_child(divmod, 17, 5, subject=Path("scan 7.tif"))
if {started}:
    call()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
said = []
while taken:
    os.close(taken.pop())
    try:
        said.append(call())
        break
    except DecoderUnavailable as error:
        said.append(str(error))
        assert "scan 7.tif: " in said[-1] and "64 descriptors allowed" in said[-1], said
print(len(said) > 1, said[-1])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("True (3, 2)\n", "")


def test_the_server_ends_with_its_caller():
    """Also with one that had no time to say so."""
    program = (
        "import os, signal; from pathlib import Path; from engine import isolate;"
        "isolate.in_child(os.getpid, subject=Path('x'));"
        "print(isolate._server._process.pid, flush=True); signal.raise_signal(signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    number = int(done.stdout)
    assert wait_until(lambda: not psutil.pid_exists(number) or psutil.Process(number).status() == "zombie")
