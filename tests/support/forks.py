"""Jobs without their minutes of imports: an interpreter, for tests, whose processes are forked from one with libraries.

A job of Snakemake is a new Python, which loads PyTorch and transformers for five seconds of processor before it does
a tiny piece of work. Here `Forks.python` stands for the interpreter: a command line that begins with it is run by a
process forked from a server that has those libraries loaded already. Everything else is as in production: the rule's
shell command, the script and its `main`, retort's own modules, a process of its own with its arguments, environment,
descriptors, folder, umask and limits; its exit status, and the signals that are sent to it.

What differs, so that a test that is about it keeps the real interpreter (`sys.executable`, `Place.start`,
`Place.as_it_is`): the process that a shell started is the client, and the job another, in a process group and a session
of its own, without a controlling terminal. A signal to the client goes to the job's whole group (one that is sent to
the job alone in production as well), SIGSTOP to nobody. A script's own children are real interpreters, but for ranks.

A server is started where it is first asked for, one for each kind of libraries and set of variables that libraries
read when they are loaded. Requests with other variables than an environment that is served, threads' numbers apart, get
the real interpreter; so do all that come from another user or namespace, but for UTS, which the job enters.
"""

import marshal
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

from support.fork_client import surroundings
from support.fork_server import runs_snakemake, set_by_scripts
from support.place import REPOSITORY, Place

HERE = Path(__file__).parent
# Those that leave PyTorch out, but where a user's own code runs in them.
LIGHT_SCRIPTS = ("tokenize_shard", "draw_corpus", "index_tokens", "report")
# Variables that libraries read when they are loaded, by their beginnings.
THREADS = (
    *("OMP_NUM_", "GOTO_NUM_", "OPENBLAS_NUM_"),
    *("MKL_NUM_", "VECLIB_MAXIMUM_", "NUMEXPR_NUM_"),
)
READ_AT_LOAD = (
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_", "ACCELERATE_"),
    *("TORCH", "PYTORCH_", "USE_", "JAX_", "TF_", "WANDB_", "MPL", "NUMBA_", "HDF5_", "ARROW_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "NUMEXPR_", "MALLOC_", "GLIBC_"),
    *("PYTHON", "LANG", "LC_", "TZ", "LD_", "XDG_", "HOME"),
)
# Those of the same beginnings that are not read then.
AT_WORK = ("PYTHONPATH", "PYTHON_EXEC", "TORCHELASTIC_", "TORCH_NCCL_")
Variables = tuple[tuple[str, str], ...]
Key = tuple[str, Variables]


def read_at_load(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that libraries read when they are loaded."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith((*READ_AT_LOAD, *THREADS)) and not name.startswith(AT_WORK)
    }


def without_threads(variables: Mapping[str, str]) -> dict[str, str]:
    """Return variables without those that number threads."""
    return {name: value for name, value in variables.items() if not name.startswith(THREADS)}


class Forks:
    """Fork servers, and the file `python` that stands for the interpreter; to be closed."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        sources: Path,
        real: frozenset[str] = frozenset(),
    ) -> None:
        """Listen in a folder for jobs with an environment's variables.

        `sources` is the folder of `retort`, whose `run_script` says what a script sets before it loads libraries.
        Scripts of the names `real` get the real interpreter.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.python, self.log = folder / "python", folder / "log.txt"
        self._sources, self._real = sources, real
        self.refused: list[
            str
        ] = []  # commands whose variables or surroundings nobody serves: real starts
        self._served: dict[Variables, dict[str, str]] = {}
        self.serve(environment)
        self._servers: dict[Key, tuple[subprocess.Popen[bytes], socket.socket]] = {}
        self._surroundings = surroundings()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A socket's path has 108 bytes at most.
        self._meeting = Path(tempfile.mkdtemp(prefix="forks-"))
        address = str(self._meeting / "socket")
        self._listener.bind(address)
        self._listener.listen(64)
        start = f"#!{sys.executable} -IS"
        if len(start) > 250 or " " in sys.executable:
            raise ValueError(f"the kernel cannot start {sys.executable!r} by a script's first line")
        self.python.write_text(
            f"{start}\nimport sys\nsys.path.insert(0, {str(HERE)!r})\nfrom fork_client import main\n"
            f"main({sys.executable!r}, {address!r}, sys.argv[1:])\n"
        )
        self.python.chmod(0o755)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def serve(self, environment: Mapping[str, str]) -> None:
        """Take jobs with another environment's variables too."""
        # What a training sets for its ranks, which run the same script.
        of_ranks = set_by_scripts(environment, str(self._sources)) | {
            "TORCH_CPP_LOG_LEVEL": "ERROR"
        }
        for variables in (environment, of_ranks):
            read = without_threads(read_at_load(variables))
            self._served[tuple(sorted(read.items()))] = without_threads(variables)

    def close(self) -> None:
        """End the servers, and with them what still runs. Raises RuntimeError when one had failed."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        shutil.rmtree(self._meeting)
        for _, asked in self._servers.values():
            asked.close()
        statuses = [server.wait(timeout=60) for server, _ in self._servers.values()]
        if any(statuses):
            raise RuntimeError(f"a fork server failed, {statuses}: {self.log.read_text()[-3000:]}")

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            with client:
                client.settimeout(60)
                message, descriptors, _, _ = socket.recv_fds(client, 1 << 22, 256)
                try:
                    if not message or not self._hand_on(message, [client.fileno(), *descriptors]):
                        client.send(b"refused")
                except OSError:
                    with suppress(OSError):  # the client is gone, or the server is: `close` says so
                        client.send(b"refused")
                for descriptor in descriptors:
                    os.close(descriptor)

    def _hand_on(self, message: bytes, descriptors: list[int]) -> bool:
        """Give a request to its server; return False for what no server takes."""
        request = marshal.loads(message)
        if Path(request["words"][0]).stem in self._real:
            return False
        environment = {os.fsdecode(k): os.fsdecode(v) for k, v in request["env"].items()}
        read = read_at_load(environment)
        found = tuple(sorted(without_threads(read).items()))
        if request["surroundings"] != self._surroundings or found not in self._served:
            what = (request["surroundings"], found)
            self._note(f"refused {request['words'][:2]}: {what} is not what is served")
            self.refused.append(" ".join(request["words"][:2]))
            return False
        key = (find_kind(request["words"]), tuple(sorted(read.items())))
        if key not in self._servers:
            self._servers[key] = self._start(key[0], self._served[found] | read)
        socket.send_fds(self._servers[key][1], [message], descriptors)
        return True

    def _note(self, line: str) -> None:
        with self.log.open("a") as log:
            log.write(line + "\n")

    def _start(
        self, kind: str, environment: dict[str, str]
    ) -> "tuple[subprocess.Popen[bytes], socket.socket]":
        """Start a server with the variables that it is for."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = environment | {"RETORT_SOURCES": str(self._sources)}
        environment.pop("PYTHONPATH", None)
        code = (
            f"import sys; sys.path[0] = {str(HERE)!r}; from fork_server import main; sys.path.pop(0)\n"
            f"main({kind!r}, {its.fileno()}, {str(self.python)!r})"
        )
        with its, self.log.open("ab") as log:
            server = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd="/",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[its.fileno()],
                start_new_session=True,
            )
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        return server, ours


@contextmanager
def forked_commands(folder: Path, *, real: frozenset[str] = frozenset()) -> Iterator[Forks]:
    """Let a fork server stand for the interpreter wherever a place's command runs to its end.

    With RETORT_REAL_STARTS=1 in the environment, nothing does: every command is a real start. `real`: see `Forks`.
    """
    environment = Place(REPOSITORY).environment()
    forks = Forks(folder, environment, sources=REPOSITORY / "src", real=real)
    if os.environ.get("RETORT_REAL_STARTS") != "1":
        Place.interpreter = forks.python
    yield forks
    Place.interpreter = Path(sys.executable)
    forks.close()
    if forks.refused:  # each takes seconds longer, and nothing else would say so
        warnings.warn(
            f"{len(forks.refused)} commands were real starts ({forks.log} says why): {forks.refused[:3]}",
            stacklevel=1,
        )


def find_kind(words: list[str]) -> str:
    """Return which libraries a command line's job is forked from."""
    if runs_snakemake(words):
        return "snakemake"
    config = dict(pairwise(words)).get("--config", "")
    is_custom = re.search(r'"sharding": "[^"]*:|"trust_remote_code": true', config)
    return "light" if Path(words[0]).stem in LIGHT_SCRIPTS and not is_custom else "full"
