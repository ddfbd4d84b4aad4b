"""Runs in processes of their own."""

import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

from tqdm.auto import tqdm


def in_processes(function: Callable[..., None], items: Sequence[tuple], jobs: int) -> list[tuple]:
    """``function(*item)`` of every item, ``jobs`` at a time; returns those that failed, which say why themselves.

    A process for each: torch keeps the threads that it started with, and peak memory is a run's own. One that is
    killed, as for lack of memory, takes no other with it.
    """
    # Spawned: a forked process would share the parent's peak memory and torch's threads.
    context = get_context("spawn")
    waiting, running, failed = list(items), {}, []
    with tqdm(total=len(items), desc="runs") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                process = context.Process(target=function, args=waiting[0])
                process.start()
                running[process.sentinel] = process, waiting.pop(0)
            for sentinel in wait(list(running)):
                process, item = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    failed.append(item)
                bar.update()
    return failed


def exit_code(failed: Sequence[Path]) -> int:
    """Of a benchmark whose results for these files were not made, which is said."""
    for file in failed:
        print(f"{file}: not written, its run failed", file=sys.stderr)
    return int(bool(failed))
