"""Numba's decorators for the inner loops of the codec, and where their machine code is cached.

numba compiles a function again when its own file changes, but not when a function that was inlined into it does: after
an update, records were decoded by the old layout of a table. So the folder of the machine code is named by a digest of
all modules that use these decorators: a change to any of them compiles everything again.
"""

from pathlib import Path

import numba
import xxhash


def _name_cache_folder() -> Path:
    """Return the folder, named by this module and all in its package that import it.

    numba creates it, or uses a folder in the user's home where this one is not writable.
    """
    here = Path(__file__)
    others = sorted(path for path in here.parent.glob("*.py") if path != here)
    importing = [source for path in others if b"retort.cache.jit" in (source := path.read_bytes())]
    digest = xxhash.xxh3_64_hexdigest(b"".join([here.read_bytes(), *importing]))
    return here.parent / "__pycache__" / f"compiled-{digest}"


numba.config.CACHE_DIR = str(_name_cache_folder())
# Without reference counting, which took 0.6 of a decoder's time: such functions cannot create arrays.
jit = numba.njit(cache=True, nogil=True, _nrt=False, error_model="numpy")
inlined = numba.njit(cache=True, nogil=True, _nrt=False, error_model="numpy", forceinline=True)
