"""How every script starts and ends: quiet libraries, one line per message, one sentence per user's mistake.

Progress goes to stderr, which a rule shows on the terminal and keeps in its log; so do errors. A ValueError is the
user's to mend: its sentence is printed without a traceback. Anything else is ours, and keeps its traceback.
"""

import os
import sys
import warnings
from collections.abc import Callable


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; exit with status 1 and one sentence on a ValueError."""
    # Threads that wait must sleep, not spin: on a machine with other work, two spinning threads trained 10x slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def say(message: str) -> None:
    """Print one line for the person at the terminal (and for the log)."""
    print(message, file=sys.stderr, flush=True)
