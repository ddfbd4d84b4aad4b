"""Runs in processes of their own."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def in_processes(function: Callable[..., None], items: Sequence[tuple], jobs: int) -> None:
    """``function(*item)`` of every item, ``jobs`` at a time; the first error is raised.

    A process for each: torch keeps the threads that it started with, and peak memory is a run's own.
    """
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in [pool.submit(function, *item) for item in items]:
            future.result()
