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
    begun = deque[Future[Found]]()
    pool = ThreadPoolExecutor(threads or most, "ahead")
    try:
        for each in asked:
            begun.append(pool.submit(one, each))
            if len(begun) > most:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
