"""Work on many things in several threads, handed on in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Asked = TypeVar("Asked")
Found = TypeVar("Found")


def ahead(
    one: Callable[[Asked], Found], asked: Iterable[Asked], most: int, threads: int | None = None
) -> Iterator[Found]:
    """`one` of each in order, no further ahead than `most`, in `threads` threads (default: as many); with a
    `most` of 0 in this one."""
    if not most:
        yield from map(one, asked)
        return
    pool = ThreadPoolExecutor(threads or most, "ahead")
    try:
        yield from results((pool.submit(one, each) for each in asked), most)
    finally:
        pool.shutdown(cancel_futures=True)


def results(begun: Iterable[Future[Found]], most: int) -> Iterator[Found]:
    """What comes of each in order; no more than `most` are begun beyond the one that is waited for."""
    waiting = deque[Future[Found]]()
    for one in begun:
        waiting.append(one)
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
