"""Object stores: what fails but may pass is asked again with growing pauses, then given up with one clear message."""

import errno
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import fsspec

from mmtrain.config_errors import UserError, clip, say_once

Answer = TypeVar("Answer")
PAUSES = (1, 2, 4, 8, 16, 30, 60)  # seconds before each further try
PATIENCE = 300.0  # seconds after which no try begins any more: other processes wait at most ten minutes for this one
STALL = 30.0  # seconds without a byte after which a connection counts as dead
TOLD_AFTER = 3  # failed tries before the user hears of it
BUSY = (408, 425, 429)  # HTTP statuses below 500 that mean "later"


def open_store(url: str) -> tuple[Any, str]:
    """File system of a URL, and the path in it. HTTP gets a time limit for each read; S3 and GCS have their own."""
    if not url.startswith(("http://", "https://")):
        return fsspec.core.url_to_fs(url)
    import aiohttp  # slow, and only needed here

    # its default is five minutes for a whole answer: too long for one that hangs, too short for a slow large one
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
    return fsspec.core.url_to_fs(url, client_kwargs={"timeout": timeout})


def read_ranges(places: Sequence[tuple[str, int, int]]) -> list[bytes | OSError]:
    """Blocks (url, offset, size) of one object store, all at once: many small requests take the time of one.

    Returns:
        For each the bytes; or why there are none and will be none: the object is gone, shorter, or may not be read.

    Raises:
        UserError: the store does not answer, see `patiently`.
    """
    answers: list[bytes | OSError | None] = [None] * len(places)

    def ask() -> None:
        fs, _ = open_store(places[0][0])
        open_ones = [i for i, answer in enumerate(answers) if answer is None]
        urls, starts, sizes = zip(*(places[i] for i in open_ones), strict=True)
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        blocks = fs.cat_ranges(list(urls), list(starts), ends, on_error="return")
        for i, block in zip(open_ones, blocks, strict=True):
            if isinstance(block, bytes):
                answers[i] = block
            elif is_final(block):
                answers[i] = OSError(f"{places[i][0]}: {reason(block)}")
        if passing := [block for block in blocks if not isinstance(block, bytes) and not is_final(block)]:
            raise passing[0]

    if places:
        patiently(places[0][0], ask)
    return [answer for answer in answers if answer is not None]


def patiently(url: str, action: Callable[[], Answer]) -> Answer:
    """What `action` returns; it is called again, after a pause, while it fails in a way that may pass.

    Raises:
        OSError: it failed in a way that will not pass.
        UserError: it still fails after the last of `PAUSES`, or after `PATIENCE`.
    """
    begun = time.monotonic()
    for tries, pause in enumerate((*PAUSES, None), start=1):
        try:
            return action()
        except Exception as error:  # each store has its own
            if is_final(error):
                raise OSError(f"{url}: {reason(error)}") from error
            seconds = time.monotonic() - begun
            if pause is None or seconds > PATIENCE:
                raise UserError(
                    f"{url}: the store does not answer: {reason(error)} (tried {tries} times in {seconds:.0f} s). "
                    "Start again with --ckpt_path last once it does"
                ) from error
            if tries == TOLD_AFTER:
                say_once(f"warning: {url}: {reason(error)} for {seconds:.0f} s; asking again")
        # spread, so that thousands of processes do not come back at once; a generator of its own leaves others alone
        time.sleep(pause * random.Random().uniform(0.5, 1.0))
    raise AssertionError("the last try returns or raises")


def is_final(error: BaseException) -> bool:
    """Whether asking again is useless: not there, not allowed, a place behind the end, or a wrong question."""
    error = behind(error)
    status = getattr(error, "status", None)
    if isinstance(status, int) and status >= 400:
        return status < 500 and status not in BUSY
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | ImportError | UserError):
        return True
    return isinstance(error, OSError) and error.errno == errno.EINVAL  # a range that S3 does not have


def behind(error: BaseException) -> BaseException:
    """Asked for a size, fsspec says of whatever goes wrong over HTTP that there is no such file; here is what did."""
    cause = error.__cause__
    return cause if cause is not None and type(cause).__module__.startswith("aiohttp") else error


def reason(error: BaseException) -> str:
    """One line."""
    error = behind(error)
    status, message = getattr(error, "status", None), getattr(error, "message", "")
    if isinstance(status, int):
        return f"{status} {message}".strip()
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {clip(text, 160)}" if text else type(error).__name__
