"""Numba's decorators for the inner loops of the codec, and where their machine code is cached.

numba compiles a function again when its own file changes, but not when a function that was inlined into it does: after
an update, records were decoded by the old layout of a table. So the folder of the machine code is named by a digest of
all modules that use these decorators: a change to any of them compiles everything again.
"""

from pathlib import Path

import numba
import xxhash


def _name_cache_folder() -> Path:
    """Return the folder, named by the sources in this package that import this module.

    numba makes it, or uses a folder of the user's where this one cannot be written.
    """
    here = Path(__file__).parent
    sources = [path.read_bytes() for path in sorted(here.glob("*.py"))]
    used = b"".join(
        source for source in sources if b"import numba" in source or b"cache.jit" in source
    )
    return here / "__pycache__" / f"compiled-{xxhash.xxh3_64_hexdigest(used)}"


numba.config.CACHE_DIR = str(_name_cache_folder())
# Without reference counting, which took 0.6 of a decoder's time: such functions cannot create arrays.
jit = numba.njit(cache=True, nogil=True, _nrt=False, error_model="numpy")
inlined = numba.njit(cache=True, nogil=True, _nrt=False, error_model="numpy", forceinline=True)
