"""Code that a model writes holds no memory that the sandbox's bound does not count."""

from __future__ import annotations

import os
import shutil
import time
import tracemalloc

import pytest

from posttrain.verifiers.sandbox import End, Limits, Sandbox

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap")

HEAD = """
import ctypes, errno, mmap, os, socket
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = libc.mmap.restype = ctypes.c_void_p
def said(result):
    print(result if result >= 0 else errno.errorcode[ctypes.get_errno()])
"""

ATTACKS = {
    "a System V segment that is left": """
held = 0
for _ in range(50):
    segment = libc.shmget(0, 16 << 20, 0o1600)
    if segment < 0:
        break
    at = libc.shmat(segment, None, 0)
    ctypes.memset(at, 1, 16 << 20)
    libc.shmdt(ctypes.c_void_p(at))
    held += 16
said(segment)
""",
    "a memfd": """
try:
    for _ in range(50):
        descriptor = os.memfd_create("x")
        for _ in range(16):
            os.write(descriptor, bytes(1 << 20))
    print("held")
except OSError as error:
    print(errno.errorcode[error.errno])
""",
    "a secret memfd": "said(libc.syscall(447, 0))",
    "a queue": "said(libc.msgget(0, 0o1600))",
    "semaphores": "said(libc.semget(0, 32000, 0o1600))",
    "an io_uring": "said(libc.syscall(425, 4096, ctypes.create_string_buffer(512)))",
    "a key": "said(libc.syscall({'x86_64': 248}.get(os.uname().machine, 217), b'user', b'k', b'x' * 4096, 4096, -3))",
    "a BPF program": "said(libc.syscall({'x86_64': 321}.get(os.uname().machine, 280), 0, None, 0))",
    "a watch": "said(libc.inotify_init1(0))",
    "a larger pipe": """
import fcntl
try:
    print(fcntl.fcntl(os.pipe()[1], 1031, 1 << 20))
except OSError as error:
    print(errno.errorcode[error.errno])
""",
    "a userfaultfd": "said(libc.syscall({'x86_64': 323}.get(os.uname().machine, 282), 1))",
    "huge pages that a pipe keeps": "said(libc.syscall({'x86_64': 278}.get(os.uname().machine, 75), 1, None, 0, 0))",
    "rules of Landlock": "said(libc.syscall(444, None, 0, 1))",
}


def run(source: str, **limits: float) -> tuple[End, str]:
    finished = Sandbox(Limits(**{"memory_mb": 128, "seconds": 20.0} | limits)).run_program(HEAD + source, b"")
    return finished.end, finished.output.decode() + finished.errors


@pytest.mark.parametrize("source", ATTACKS.values(), ids=ATTACKS)
def test_memory_that_no_process_shows_is_refused(source: str) -> None:
    assert run(source) == (End.EXITED, "EPERM\n")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other ways in for x86-64 alone")
def test_the_same_calls_by_other_numbers() -> None:
    assert run("said(libc.syscall(0x40000000 + 29, 0, 16 << 20, 0o1600))") == (End.EXITED, "EPERM\n")
    # 32-bit: ipc(SHMGET = 23, IPC_PRIVATE, 16 MiB, IPC_CREAT | 0600) through int 0x80.
    end, said = run(
        """
code = b"\\x53" + b"".join(
    bytes([op]) + value.to_bytes(4, "little")
    for op, value in ((0xB8, 117), (0xBB, 23), (0xB9, 0), (0xBA, 16 << 20), (0xBE, 0o1600))
) + b"\\xcd\\x80\\x5b\\xc3"
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(code)
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print(call())
"""
    )
    refused = said.strip().removeprefix("-").isdigit() and int(said) < 0
    assert refused or end is not End.EXITED or "Segmentation" in said or said == "", "killed, or an error number"


FAMILIES = {"AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16, "AF_PACKET": 17, "AF_ALG": 38, "AF_VSOCK": 40, "none": 99}


@pytest.mark.parametrize("call", ["libc.socket({}, {}, 0)", "libc.socketpair({}, {}, 0, ctypes.c_buffer(8))"])
def test_sockets_of_all_families_but_unix(call: str) -> None:
    """A namespace of networks does not hold them all: by AF_VSOCK the host of a virtual machine is reached."""
    calls = "".join(f"said({call.format(family, kind)})\n" for family in FAMILIES.values() for kind in (1, 2, 3))
    high = "said(libc.syscall({'x86_64': 41}.get(os.uname().machine, 198), ctypes.c_long((1 << 32) + 40), 1, 0))"
    assert run(calls + high) == (End.EXITED, "EPERM\n" * (3 * len(FAMILIES) + 1))
    end, said = run("a, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))\nsocket.socket(socket.AF_UNIX)")
    assert (end, said) == (End.EXITED, "b'x'\n")


@pytest.mark.parametrize("make", ["os.symlink('x', f'/tmp/{n}')", "open(f'/tmp/{n}', 'w').close()", "os.mkdir(str(n))"])
def test_files_without_content_count_as_memory(make: str) -> None:
    source = f"""
for n in range(1_000_000):
    {make}
"""
    assert run(source, memory_mb=32)[0] is End.MEMORY


def test_a_file_system_of_ones_own_cannot_be_had() -> None:
    for source in (
        "said(libc.unshare(0x10000000 | 0x20000))",  # CLONE_NEWUSER | CLONE_NEWNS
        "said(libc.mount(b'none', b'/tmp', b'tmpfs', 0, b'size=1g'))",
    ):
        end, said = run(source)
        assert end is End.EXITED and said.strip() in ("EPERM", "ENOSPC", "EACCES", "EINVAL")
    end, said = run("open('/dev/shm/x', 'wb')")
    assert "OSError" in said or "PermissionError" in said


def test_the_bound_holds_for_what_is_mapped() -> None:
    """Shared pages of several processes, of which each has less than the limit."""
    source = """
for _ in range(6):
    if os.fork() == 0:
        page = mmap.mmap(-1, 48 << 20)
        for place in range(0, 48 << 20, 4096):
            page[place] = 1
        import time
        time.sleep(30)
import time
time.sleep(30)
"""
    started = time.monotonic()
    assert run(source)[0] is End.MEMORY and time.monotonic() - started < 15


HIDERS = {
    "in a process whose first thread has ended": """
import threading, time
def hold():
    time.sleep(0.2)
    page = bytearray(b"x") * (100 << 20)
    time.sleep(9)
for _ in range(3):
    if os.fork() == 0:
        threading.Thread(target=hold).start()
        libc.syscall({"x86_64": 60}.get(os.uname().machine, 93), 0)
time.sleep(9)
""",
    "in shared segments that are not mapped just now": """
import time
for _ in range(4):
    if os.fork() == 0:
        segment = mmap.mmap(-1, 60 << 20)
        for place in range(0, 60 << 20, 4 << 20):
            segment[place : place + (4 << 20)] = b"x" * (4 << 20)
            segment.madvise(mmap.MADV_DONTNEED)
        time.sleep(9)
time.sleep(9)
""",
}


@pytest.mark.parametrize("source", HIDERS.values(), ids=HIDERS)
def test_memory_that_hides_from_the_first_look(source: str) -> None:
    assert run(source, seconds=8.0)[0] is End.MEMORY


def test_what_is_written_to_standard_error_fills_no_memory_here() -> None:
    """More than a GiB in three seconds was kept, in the process that judges."""
    tracemalloc.start()
    end, _ = run("while True: os.write(2, bytes(1 << 20))", seconds=1.0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert end is End.TIME and most < 8 << 20


def test_sockets_and_pipes_hold_a_bounded_amount() -> None:
    source = """
held, kept = 0, []
try:
    while True:
        kept.append(socket.socketpair())
        kept[-1][0].setblocking(False)
        try:
            while True:
                held += kept[-1][0].send(bytes(1 << 16))
        except BlockingIOError:
            pass
except OSError:
    pass
print(held >> 20)
"""
    end, said = run(source)
    assert end is End.EXITED and int(said) < 32


def test_what_holds_is_said() -> None:
    said = Sandbox(Limits(memory_mb=128)).check()
    assert "bubblewrap, no network" in said and "128 MiB" in said and "memfds refused" in said
    assert "NO ISOLATION" in Sandbox(Limits(), "rlimit").check()


def test_ordinary_code_runs_as_before() -> None:
    source = """
import asyncio, threading, tempfile, subprocess, sys
async def double(x): return 2 * x
print(asyncio.run(double(2)))
threads = [threading.Thread(target=lambda: None) for _ in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
with tempfile.TemporaryFile() as file: file.write(b"x")
print(subprocess.run([sys.executable, "-S", "-c", "print(3)"], capture_output=True, text=True).stdout.strip())
r, w = os.pipe(); os.write(w, b"x"); print(os.read(r, 1))
"""
    assert run(source, memory_mb=512) == (End.EXITED, "4\n3\nb'x'\n")
