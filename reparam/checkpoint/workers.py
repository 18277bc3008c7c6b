"""Work on several cores: forked processes that take one item after the other.

Not threads: a conversion is many operations of some ten microseconds, after each of which a thread waits for the
interpreter lock; two threads are no faster than one. A forked process has the function and all it refers to without
anything being sent; only indices go in, and small results come out. Where a system cannot fork, or where little is to be
done, the work is done right here.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, current_process
from typing import Any, TypeVar

import torch

from reparam.errors import ReparamError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Just below the 32 MB up to which glibc adapts.
_KEPT = (32 << 20) - 8192
# torch is not safe to fork where the system's own libraries keep threads of their own.
_CAN_FORK = "fork" in multiprocessing.get_all_start_methods() and os.uname().sysname == "Linux"


def each(
    function: Callable[[_Item], _Result], items: Sequence[_Item], parallel: bool
) -> Iterator[tuple[int, _Result]]:
    """``(i, function(items[i]))`` for all items, as they get done.

    Args:
        function: run with torch's own threads off; what it changes in memory is lost unless it returns it.
        items: in the order in which they are begun.
        parallel: whether they are worth processes, as many as torch has threads.

    Raises:
        Exception: whatever ``function`` raises; no further item is begun.
        ReparamError: a process was killed.
    """
    count = min(torch.get_num_threads(), len(items))
    if parallel and count > 1 and _CAN_FORK and not current_process().daemon:
        yield from _in_processes(function, items, count)
    else:
        for i, item in enumerate(items):
            with single_threaded():
                result = function(item)
            yield i, result


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """torch's own threads off: they wait for one another in a spin after every operation, which costs more than they gain."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _in_processes(
    function: Callable[[Any], Any], items: Sequence[Any], count: int
) -> Iterator[tuple[int, Any]]:
    working: dict[Connection, BaseProcess] = {}
    todo = iter(range(len(items)))
    processes: list[BaseProcess] = []
    ours: list[Connection] = []
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(function, items, theirs, [*ours, mine]), daemon=True
            )
            with warnings.catch_warnings():
                # Python warns of forking beside threads, which may hold locks; the child takes none of theirs.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            ours.append(mine)
            processes.append(process)
            working[mine] = process
            mine.send(next(todo))
        while working:
            for ready in wait(list(working)):
                assert isinstance(ready, Connection)
                worker = working.pop(ready)
                try:
                    i, error, result = ready.recv()
                except (EOFError, ConnectionResetError):
                    worker.join()
                    raise ReparamError(
                        f"a worker process was killed (exit code {worker.exitcode}): is memory short? "
                        "nothing was written"
                    ) from None
                if error is not None:
                    raise error
                following = next(todo, None)
                if following is not None:
                    ready.send(following)
                    working[ready] = worker
                yield i, result
    finally:
        for connection in ours:
            connection.close()
        for started in processes:
            started.terminate()
            started.join()


def _work(
    function: Callable[[Any], Any], items: Sequence[Any], pipe: Connection, others: Sequence[Connection]
) -> None:
    """A process's life: until the other end of its pipe is closed, as it is when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for connection in others:
        connection.close()
    torch.set_num_threads(1)
    _keep_freed_memory()
    with contextlib.suppress(EOFError, OSError):
        while True:
            i = pipe.recv()
            try:
                pipe.send((i, None, function(items[i])))
            except Exception as error:
                pipe.send((i, _sendable(error), None))
    os._exit(0)


def _keep_freed_memory() -> None:
    """Have glibc hand a block's buffers out again, instead of giving their pages back to the system after every use.

    Freeing one large buffer raises its thresholds for that to about the buffer's size, and touches none of its pages.
    Elsewhere this does nothing.
    """
    torch.empty(_KEPT, dtype=torch.uint8)


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
