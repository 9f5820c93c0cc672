"""Maps a file as a tensor without a copy, and reads all of it into memory at once.

Touching a fresh map page by page takes about as long as the matrix-vector products with the expert in it. Two hints to
the kernel (Linux) make that time negligible: huge pages, in which the file is then read from disk and mapped (an expert
of 8 MiB is four entries in the page table instead of two thousand); and populating, one call that reads and maps
everything. That call releases Python's lock, so a thread waiting for the disk blocks no other.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

PAGE = 4096  # bytes
_HUGEPAGE, _POPULATE_READ = 14, 22  # Linux's MADV_*; the second since 5.14
_libc = ctypes.CDLL(None, use_errno=True)


class Version(NamedTuple):
    """What `stat` says of a file, which changes when the file is written to, replaced, linked or renamed."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The version that a stat result describes."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def map_file(path: Path, size: int) -> tuple[Tensor, Version]:
    """The first `size` bytes of a file as uint8 [size], page-aligned, and the version of the file that is mapped.

    The file is unmapped with the last view of the tensor. Writing to the tensor does not change the file. No file
    descriptor stays open.

    Raises:
        OSError: the file cannot be opened or read, or is smaller.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        version = Version.of(os.fstat(descriptor))
        if version.size < size:
            raise OSError(errno.EIO, f"has {version.size} bytes, not {size}")
        # By its descriptor: the path may name another file by now.
        tensor = torch.from_file(f"/dev/fd/{descriptor}", shared=False, size=size, dtype=torch.uint8)
    finally:
        os.close(descriptor)
    if sys.platform == "linux":
        _advise(tensor, _HUGEPAGE)  # not supported everywhere, and not needed
        failed = _advise(tensor, _POPULATE_READ)
        if not failed:
            return tensor, version
        if failed != errno.EINVAL:  # a failing disk or a truncated file: touching the page would kill the process
            raise OSError(failed, os.strerror(failed))
    tensor[::PAGE].sum()  # without that advice: touches every page
    return tensor, version


def drop_from_page_cache(path: Path) -> None:
    """Drops a file's unmapped pages from the system's page cache; the next read comes from disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _advise(tensor: Tensor, advice: int) -> int:
    """Zero, or the error number."""
    done = _libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel()), advice)
    return ctypes.get_errno() if done else 0
