"""Runs kernels in a process of its own, under the sanitizers. Standard library only: AddressSanitizer is preloaded here.

Reads pickled requests from standard input, answers on standard output. A kernel that the sanitizers or the emulation object
to ends the process; what they said is on standard error.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys

POISON = 0xFF  # NaN in every floating type, -1 in every integer type


def main(library_path: str) -> None:
    library = ctypes.CDLL(library_path)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            name, seed, shared, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        os.environ["CUDA_ON_CPU_SEED"] = str(seed)
        os.environ["CUDA_ON_CPU_SHARED"] = str(shared)
        values, blocks, wanted = [], [], []
        for kind, value in arguments:
            if kind in ("in", "out", "inout"):
                content, skew = value
                size = content if kind == "out" else len(content)
                block = libc.malloc(size + skew)
                blocks.append(block)
                ctypes.memset(block, POISON, size + skew)
                if kind != "out":
                    ctypes.memmove(block + skew, content, size)
                values.append(ctypes.c_void_p(block + skew))
                if kind != "in":
                    wanted.append((block + skew, size))
            elif kind == "none":
                values.append(ctypes.c_void_p(None))
            elif kind == "int":
                values.append(ctypes.c_int64(value))
            else:
                values.append(ctypes.c_double(value))
        getattr(library, name).restype = None
        getattr(library, name)(*values)
        pickle.dump([ctypes.string_at(address, size) for address, size in wanted], answers)
        answers.flush()
        for block in blocks:
            libc.free(block)


if __name__ == "__main__":
    main(sys.argv[1])
