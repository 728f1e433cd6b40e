"""Memory that was freed is used again rather than given back to the system and asked for anew, block after block."""

import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_KEPT = 32 * 1024**2  # the highest threshold that glibc takes
NEVER = 2**31 - 1


def _mallopt(arenas: int, trim: int) -> None:
    """Sets parameters of glibc's allocator; does nothing where there is another one."""
    try:
        library = ctypes.CDLL(None)
        function, give_back = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        return
    for name, value in ((M_ARENA_MAX, arenas), (M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, trim)):
        function(name, value)
    if trim != NEVER:
        give_back(0)


def keep_freed_memory() -> None:
    """Keeps what is freed for the blocks of cells that follow; call it before the store is opened, as threads settle
    early on where they allocate. Fresh pages for every block would cost as much time as decoding."""
    _mallopt(arenas=1, trim=NEVER)


def return_freed_memory() -> None:
    """Gives back what is free, and from now on does so as glibc does once it has seen large blocks freed."""
    _mallopt(arenas=0, trim=2 * LARGEST_KEPT)
