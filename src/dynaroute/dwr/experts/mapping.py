"""One file as a tensor without a copy: mapped, and brought into memory at once.

Touching a fresh map page by page takes about as long as the matrix-vector products with the expert in it. Two pieces
of advice to the kernel (Linux) make it next to nothing: huge pages, in which the file is then read from disk and mapped
(an expert of 8 MiB is four entries in the page table, not two thousand); and populating, one call that reads and maps
everything. Python's lock is free during that call, so a thread that waits for the disk holds up nobody.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

PAGE = 4096  # bytes
_HUGEPAGE, _POPULATE_READ = 14, 22  # MADV_* of Linux; the latter since 5.14
_libc = ctypes.CDLL(None, use_errno=True)


def map_file(path: Path, size: int) -> Tensor:
    """The first `size` bytes of a file as uint8 [size], on a page of memory; unmapped with the last view of it.

    Writing to it does not change the file. No file descriptor stays open.

    Raises:
        OSError: the file cannot be opened or read, or is smaller.
    """
    if path.stat().st_size < size:
        raise OSError(errno.EIO, f"has {path.stat().st_size} bytes, not {size}")
    tensor = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    if sys.platform == "linux":
        _advise(tensor, _HUGEPAGE)  # not everywhere, and not needed
        failed = _advise(tensor, _POPULATE_READ)
        if not failed:
            return tensor
        if failed != errno.EINVAL:  # a disk that fails, a file cut short: touching it would end the process
            raise OSError(failed, os.strerror(failed))
    tensor[::PAGE].sum()  # where there is no such advice: touches every page
    return tensor


def drop_from_page_cache(path: Path) -> None:
    """Lets the system forget a file's pages, but for those that are mapped; the next read comes from disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _advise(tensor: Tensor, advice: int) -> int:
    """Zero, or the number of the error."""
    done = _libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel()), advice)
    return ctypes.get_errno() if done else 0
