"""What runs inside a sandbox: bounds itself, then plays one of three parts. Standard library only; run as a script.

- `program` is the tested code alone, with its own standard input and output.
- `solution` is the tested code as a server: it is asked to call a function and answers with the value.
- `tests` holds the unit tests, in a sandbox of its own. To them the tested function is a stand-in that asks the
  `solution`. Only this part reports, on a pipe that the tested code does not have. So nothing that the tested code does
  to its own interpreter, its output or its exit status can make a test pass: it can only answer calls, as plain data.

The source of this module is handed to `python -c`, since the sandbox does not see the project's files.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import json
import os
import resource
import struct
import sys
import types
from collections.abc import Iterator
from typing import Any

MAX_FRAME = 32 << 20
"""Bytes of one call or one answer."""

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SIGKILL = 9

# What holds memory that no process shows as its own (System V segments, queues and semaphores, memfds, keys, watches,
# huge pages that a pipe keeps by vmsplice, rules of Landlock), or reaches far into the kernel. By machine: the code of
# its system calls, and their numbers.
_REFUSED = {
    "x86_64": (0xC000003E, "29 64 68 240 248 249 250 253 278 294 298 300 319 321 323 425 444 445 446 447"),
    "aarch64": (0xC00000B7, "194 190 186 180 217 218 219 26 75 262 241 279 280 282 425 444 445 446 447"),
}

# By machine: socket, socketpair, fcntl.
_BY_ARGUMENT = {"x86_64": (41, 53, 72), "aarch64": (198, 199, 25)}
_AF_UNIX, _F_SETPIPE_SZ = 1, 1031


class ProtocolError(Exception):
    """The other side has ended, or sent what is not an answer."""


class Unsendable(Exception):
    """A value that is not plain data."""


class SolutionError(Exception):
    """Raised in the tests where the tested code raised something that is no built-in exception."""


# ------------------------------------------------------------------------------------------------- values on the wire


def encode(value: Any) -> Any:
    """Plain data as JSON that keeps types apart; subclasses become what they are made of, numpy values too.

    Raises:
        Unsendable: something else, such as a function.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value) if -(2**63) < value < 2**63 else {"t": "int", "v": hex(value)}
    if isinstance(value, float):
        return float(value)
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist())
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"t": "dict", "v": [[encode(key), encode(item)] for key, item in value.items()]}
    for name, kind in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {"t": name, "v": [encode(item) for item in value]}
    if isinstance(value, bytes | bytearray):
        return {"t": "bytes" if isinstance(value, bytes) else "bytearray", "v": value.decode("latin-1")}
    if isinstance(value, complex):
        return {"t": "complex", "v": [value.real, value.imag]}
    if isinstance(value, range):
        return {"t": "range", "v": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
        return {"t": "iterator", "v": [encode(item) for item in value]}
    raise Unsendable(type(value).__name__)


def decode(data: Any) -> Any:
    """The value again. Whatever `data` holds, only plain data comes of it.

    Raises:
        ValueError, TypeError, KeyError, IndexError, RecursionError: not made by `encode`.
    """
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    kind, inner = data["t"], data["v"]
    if kind == "int":
        return int(inner, 16)
    if kind in ("bytes", "bytearray"):
        raw = inner.encode("latin-1")
        return raw if kind == "bytes" else bytearray(raw)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in inner}
    if kind == "complex":
        return complex(float(inner[0]), float(inner[1]))
    items = [decode(item) for item in inner]
    if kind == "range":
        return range(*items)
    if kind == "iterator":
        return iter(items)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](items)


class Channel:
    """Frames of JSON over two file descriptors."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode("ascii")
        data = len(data).to_bytes(4, "big") + data
        try:
            while data:
                data = data[os.write(self.write, data) :]
        except OSError as error:
            raise ProtocolError("the other side has ended") from error

    def receive(self) -> Any:
        size = int.from_bytes(self._exactly(4), "big")
        if size > MAX_FRAME:
            raise ProtocolError(f"a message of {size} bytes")
        try:
            return json.loads(self._exactly(size))
        except (ValueError, RecursionError) as error:
            raise ProtocolError("a message that is not JSON") from error

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self.read, min(size, 1 << 20))
            if not part:
                raise ProtocolError("the other side has ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


# --------------------------------------------------------------------------------------------------------- the bounds


def confine(limits: dict[str, Any]) -> None:
    """Bound this process and all it starts. As root of the sandbox, become a user of nothing first."""
    if limits["user"]:
        _no_more_namespaces()
        os.setgroups([])
        os.setresgid(*[limits["user"]] * 3)
        os.setresuid(*[limits["user"]] * 3)
    sys.path += limits["packages"]
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if limits["parent"]:
        libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)
        if os.getppid() != limits["parent"]:
            raise SystemExit("the parent has gone")
    memory, file = limits["memory"], limits["file"]
    bounds = {"AS": memory, "FSIZE": file, "CPU": limits["seconds"], "NOFILE": 64, "CORE": 0, "MEMLOCK": 0}
    bounds |= {"MSGQUEUE": 0, "SIGPENDING": 256}
    if limits["processes"]:
        bounds["NPROC"] = limits["processes"]
    for name, bound in bounds.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is not None:
            hard = resource.getrlimit(which)[1]
            bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
            resource.setrlimit(which, (bound, bound))
    _refuse_calls(libc, sockets=limits["sockets"])


def _refuse_calls(libc: ctypes.CDLL, *, sockets: bool) -> None:
    """Have the kernel answer some system calls with EPERM, for this process and all it starts (seccomp, classic BPF).

    Pipes stay as large as they are made. Without `sockets` there are those of Unix alone: a namespace of networks does
    not hold all families (AF_VSOCK reaches the host of a virtual machine), and the buffers of others are large.

    Where it has no seccomp, or the machine is of another kind, nothing is refused; `Sandbox.check` finds out.
    """
    code, numbers = _REFUSED.get(os.uname().machine, (0, ""))
    if not code:
        return
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    # From the end, since a jump says how many lines it leaves out: to the last line, which refuses, or the one before.
    program = [(end, 0, 0, 0x7FFF0000), (end, 0, 0, 0x00050001)]
    socket, pair, fcntl = _BY_ARGUMENT[os.uname().machine]
    for number, place, value, let in (
        (fcntl, 1, _F_SETPIPE_SZ, False),
        (socket, 0, _AF_UNIX, True),
        (pair, 0, _AF_UNIX, True),
    ):
        if number == fcntl or not sockets:
            ends = len(program) - 2, len(program) - 1
            tested = (equal, *(ends if let else reversed(ends)), value)
            program = [(equal, 0, 2, number), (load, 0, 0, 16 + 8 * place), tested, *program]
    for number in map(int, numbers.split()):
        program = [(equal, len(program) - 1, 0, number), *program]
    # The same calls in x32 have other numbers, from here on.
    program = [(load, 0, 0, 0), (at_least, len(program) - 1, 0, 0x40000000), *program]
    program = [(load, 0, 0, 4), (equal, 0, len(program) - 1, code), *program]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(filters)))
    libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(header), 0, 0)


def _no_more_namespaces() -> None:
    try:
        with open("/proc/sys/user/max_user_namespaces", "w") as file:
            file.write("0")
    except OSError:
        # An older kernel or a read-only /proc: a namespace made inside could do no more than this one.
        return


# ---------------------------------------------------------------------------------------------------------- the parts


def play_program(channel: Channel) -> None:
    """Become the program, with the test's input as standard input."""
    source = channel.receive()["source"]
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), _module("__main__"))  # nosec B102 # in the sandbox


def _module(name: str) -> dict[str, Any]:
    """Names of a new module that Python knows, since dataclasses look their module up."""
    module = sys.modules[name] = types.ModuleType(name)
    return module.__dict__


def play_solution(channel: Channel) -> None:
    """Load the tested code, then answer calls until the other side ends."""
    # Whatever the tested code raises, exits included, is an answer of this process, so all of it is caught.
    try:
        request = channel.receive()
        module = _module("solution")
        try:
            code = compile(request["source"], "solution.py", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            channel.send({"unparseable": _short(error)})
            return
        exec(code, module)  # nosec B102 # in the sandbox
        function = module.get(request["entry_point"])
        if not callable(function):
            channel.send({"error": f"no function {request['entry_point']}"})
            return
        channel.send({"ready": True})
    except BaseException as error:
        channel.send({"error": _short(error)})
        return
    while True:
        call = channel.receive()
        arguments = decode(call["args"])
        try:
            value = encode(function(*arguments, **decode(call["kwargs"])))
            answer = {"value": value, "args": encode(arguments)}
        except BaseException as error:
            answer = {"raised": type(error).__name__, "text": str(error)[:200]}
            if isinstance(error, Unsendable):
                answer = {"error": f"a value of type {error} is not plain data"}
        channel.send(answer)


def play_tests(channel: Channel, request: dict[str, Any]) -> dict[str, str]:
    """Run the unit tests against the solution; the report has `status` (a verdict's) and `detail`."""
    try:
        context, test = _compiled(request["context"]), compile(request["test"], "test", "exec")
    except (SyntaxError, ValueError) as error:
        return {"status": "bad_reference", "detail": f"the tests do not compile: {_short(error)}"}
    solution, failed = Solution(channel), None
    try:
        channel.send({"source": request["source"], "entry_point": request["entry_point"]})
        loaded = channel.receive()
        for status, key in (("unparseable", "unparseable"), ("wrong", "error")):
            if key in loaded:
                return {"status": status, "detail": str(loaded[key])[:200]}
        module = _module("tests")
        exec(context, module)  # nosec B102 # in the sandbox
        module[request["entry_point"]] = solution
        exec(test, module)  # nosec B102 # in the sandbox
        if callable(module.get("check")):
            module["check"](solution)
    except ProtocolError as error:
        failed = {"status": "wrong", "detail": f"no answer from the tested code: {error}"}
    except BaseException as error:
        failed = {"status": "wrong", "detail": _short(error)}
    # Tests may swallow exceptions, these too.
    return solution.broken or failed or {"status": "correct", "detail": ""}


def _compiled(context: str) -> types.CodeType:
    """The context; it may end in the head of a function, which the solution continues."""
    try:
        return compile(context, "context", "exec")
    except IndentationError:
        return compile(context + "\n    pass\n", "context", "exec")


class Solution:
    """What the tests call in place of the tested function.

    Attributes:
        broken: the report, once a call could not be made or was not answered.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.broken: dict[str, str] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        try:
            self.channel.send({"args": encode(given), "kwargs": encode(kwargs)})
            raised, value, after = _read_answer(self.channel.receive())
        except Unsendable as error:
            detail = f"the tests pass a {error} to the function, which is not plain data"
            self.broken = {"status": "bad_reference", "detail": detail}
            raise
        except ProtocolError as error:
            self.broken = {"status": "wrong", "detail": f"no answer from the tested code: {error}"}
            raise
        if raised is not None:
            raise raised
        for mine, theirs in zip(given, after, strict=False):
            _write_back(mine, theirs)
        return value


def _read_answer(answer: Any) -> tuple[Exception | None, Any, list[Any]]:
    """What a call raised, or its value and its arguments after it.

    Raises:
        ProtocolError: it is not made by `play_solution`.
    """
    try:
        if "raised" in answer:
            return _exception(str(answer["raised"]), str(answer["text"])), None, []
        if "error" in answer:
            raise ProtocolError(str(answer["error"])[:200])
        return None, decode(answer["value"]), decode(answer["args"])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ProtocolError("not plain data") from error


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if kind in (StopIteration, StopAsyncIteration):
        # Raised out of a call it would end a loop of the tests over `map` early, as if all cases had passed (PEP 479).
        return RuntimeError(f"the tested code raised {name}")
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError | ExceptionGroup):
        return kind(text)
    return SolutionError(f"{name}: {text}")


def _write_back(mine: Any, theirs: Any) -> None:
    """Some functions are meant to change what they are given."""
    if isinstance(mine, list | bytearray) and type(mine) is type(theirs):
        mine[:] = theirs
    elif isinstance(mine, dict | set) and type(mine) is type(theirs):
        mine.clear()
        mine.update(theirs)


def _short(error: BaseException) -> str:
    # A message may hold a value of the tested code's choice, of which no text can be made: a number of 5,000 digits.
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except Exception:
        return type(error).__name__


def main() -> None:
    """`python -c SOURCE part limits [read write]`: limits as JSON; descriptors to the solution (tests only)."""
    part, limits = sys.argv[1], json.loads(sys.argv[2])
    channel = Channel(0, 1)
    if part == "program":
        confine(limits)
        play_program(channel)
        return
    # Descriptors 0 to 2 become nothing, so that what code prints or reads goes nowhere.
    channel = Channel(os.dup(0), os.dup(1))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    confine(limits)
    if part == "solution":
        os.dup2(null, 2)
        try:
            play_solution(channel)
        except ProtocolError:
            return
        return
    request = channel.receive()
    report = play_tests(Channel(int(sys.argv[3]), int(sys.argv[4])), request)
    channel.send(report)
    os._exit(0)


if __name__ == "__main__":
    main()
