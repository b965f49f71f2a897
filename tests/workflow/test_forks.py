"""What stands for the interpreter in tests does as the interpreter does: each program here is run by both."""

import os
import pty
import signal
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from support.forks import Forks
from support.place import REPOSITORY, Place, wait_until

PROGRAMS = {
    "nothing": "",
    "1": "raise SystemExit(1)",
    "75": "import sys; sys.exit(75)",
    "143": "import sys; sys.exit(143)",
    "300": "raise SystemExit(300)",
    "-1": "raise SystemExit(-1)",
    "words": "import sys; print('first'); sys.exit('error: these words')",
    "traceback": "def f():\n    return 1 / 0\n\nf()",
    "syntax": "def f(:\n    pass",
    "interrupt": "raise KeyboardInterrupt",
    "SIGKILL": "import os; print('lost, as it is not flushed'); os.kill(os.getpid(), 9)",
    "SIGTERM": "import os; os.kill(os.getpid(), 15)",
    "SIGSEGV": "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), 11)",
    "at the end": "import atexit, threading, time\natexit.register(print, 'atexit')\n"
    "threading.Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()\nprint('main')",
    "a closed pipe": "import sys; sys.stdout.write('x' * 10); import os; os.close(1)",
    "its own": "import os, sys; print(sys.argv, os.getcwd(), __name__, __file__, sys.path, sys.orig_argv[1:], "
    "sys.executable, sys.flags, sorted(os.listdir('/proc/self/fd')), sorted(vars()))",
    "environment": "import os; print(sorted(os.environ.items())); os.system('echo $MARK; umask')",
    "limits": "import resource; print([resource.getrlimit(n) for n in range(resource.RLIM_NLIMITS)])",
    "signals": "import signal; print([(s, signal.getsignal(s)) for s in sorted(signal.valid_signals())], "
    "signal.pthread_sigmask(signal.SIG_BLOCK, []))",
    "streams": "import sys; print([(f.name, f.mode, f.encoding, f.errors, f.line_buffering, f.fileno(), f.isatty()) "
    "for f in (sys.stdin, sys.stdout, sys.stderr)], sys.stdin.read())",
    "threads": "import torch, os; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])",
    "processes": "import multiprocessing as m\n"
    "def f(n):\n    return n * n\n\n"
    "if __name__ == '__main__':\n"
    "    for way in ('fork', 'spawn'):\n        with m.get_context(way).Pool(2) as pool:\n"
    "            print(pool.map(f, range(5)))",
}


def run(
    python: Path | str, script: Path, *words: str, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a script in its folder, with arguments and a variable of its own."""
    env = Place(script.parent).environment() | {"MARK": "mine", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [python, script, "one", "two words", *words],
        cwd=script.parent,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        **({"input": "what is read"} | options),
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_what_it_does(name: str, forks: Forks, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAMS[name])

    def limited() -> None:
        os.umask(0o037)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    real, forked = (
        run(python, script, preexec_fn=limited) for python in (sys.executable, forks.python)
    )
    assert forked.returncode == real.returncode
    assert forked.stdout == real.stdout
    assert forked.stderr == real.stderr


def test_a_module_and_code_are_run_as_well(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys; print(__name__, sys.argv, __spec__.name, sys.path)"
    )
    code = "import sys; print(__name__, sys.argv, sys.path, sorted(vars()))"
    env = Place(tmp_path).environment() | {"OMP_NUM_THREADS": "1"}
    for words in (["-m", "mine", "word"], ["-c", code, "word"], ["-m", "absent"], ["absent.py"]):
        real, forked = (
            subprocess.run(
                [python, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
            )
            for python in (sys.executable, forks.python)
        )
        assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout)
        assert forked.stderr == real.stderr


def is_there(process: int) -> bool:
    """Say whether a process runs; a zombie does not."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# It says its own id and its child's, then waits; what a signal does it says.
WAITS = """
import os, signal, subprocess, sys, time
child = subprocess.Popen(["sleep", "300"])
def said(number, _):
    print("got", number, flush=True)
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, said)
print(os.getpid(), child.pid, os.getppid(), flush=True)
time.sleep(300)
"""


def start(forks: Forks, folder: Path) -> "tuple[subprocess.Popen[str], int, int, int]":
    """Start a job that waits; return its client, and the ids of itself, its child, and its server."""
    (folder / "waits.py").write_text(WAITS)
    client = subprocess.Popen(
        [forks.python, folder / "waits.py"],
        stdout=subprocess.PIPE,
        env=Place(folder).environment() | {"OMP_NUM_THREADS": "1"},
        text=True,
        start_new_session=True,
    )
    assert client.stdout is not None
    job, child, server = map(int, client.stdout.readline().split())
    assert is_there(job) and is_there(child) and job not in (client.pid, os.getpid())
    return client, job, child, server


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_to_the_clients_group_reaches_the_jobs(
    number: int, forks: Forks, tmp_path: Path
) -> None:
    client, job, child, _ = start(forks, tmp_path)
    os.killpg(client.pid, number)
    said, _ = client.communicate(timeout=60)
    if number == signal.SIGINT:
        assert client.returncode == -signal.SIGINT
    else:
        assert (said, client.returncode) == (f"got {number}\n", 128 + number)
    wait_until(lambda: not is_there(job) and not is_there(child))


def test_who_kills_the_client_kills_the_job(forks: Forks, tmp_path: Path) -> None:
    client, job, child, _ = start(forks, tmp_path)
    client.kill()
    wait_until(lambda: not is_there(job) and not is_there(child))


def test_who_kills_the_job_is_seen_by_the_clients_parent(forks: Forks, tmp_path: Path) -> None:
    client, job, child, _ = start(forks, tmp_path)
    os.kill(job, signal.SIGKILL)
    assert client.wait(timeout=60) == -signal.SIGKILL
    os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes machines and sets what /proc shows")
def test_a_job_is_on_its_clients_machine_and_proc_shows_it_as_itself(
    forks: Forks, tmp_path: Path
) -> None:
    """So that a node of a pretended cluster that crashes takes it along, and tests find it."""
    code = (
        "import os; from pathlib import Path; print(os.uname().nodename)\n"
        "for name in ('cmdline', 'environ'):\n"
        "    print(sorted(Path(f'/proc/self/{name}').read_text().split('\\0')))"
    )
    (tmp_path / "script.py").write_text(code)
    start = "hostname node9 && exec"
    said = [
        subprocess.run(
            ["unshare", "--uts", "sh", "-c", f"{start} {python} script.py 'two words'"],
            cwd=tmp_path,
            env=Place(tmp_path).environment() | {"MARK": "mine"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for python in (forks.python, sys.executable)
    ]
    assert said[0] == said[1] and said[0].startswith("node9\n") and "'MARK=mine'" in said[0]


def test_two_jobs_at_once_have_nothing_in_common(forks: Forks, tmp_path: Path) -> None:
    one, other = (start(forks, tmp_path) for _ in range(2))
    assert one[1] != other[1] and one[3] == other[3]
    one[0].terminate()
    assert one[0].wait(timeout=60) == 143
    assert is_there(other[1])
    other[0].terminate()
    assert other[0].wait(timeout=60) == 143
    children = Path(f"/proc/{one[3]}/task/{one[3]}/children").read_text().split()
    assert not {str(one[1]), str(other[1])} & set(children), "nothing of a job is left"


def test_a_terminal_is_handed_over_as_descriptor_3(forks: Forks, tmp_path: Path) -> None:
    leader, terminal = pty.openpty()
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.ttyname(3)); os.write(3, b'to the terminal')")
    said = subprocess.check_output(
        ["bash", "-c", f"{forks.python} {script} 3>&{terminal}"],
        env=Place(tmp_path).environment() | {"OMP_NUM_THREADS": "1"},
        pass_fds=[terminal],
        text=True,
    )
    assert said.strip() == os.ttyname(terminal)
    assert os.read(leader, 100) == b"to the terminal"
    os.close(leader)
    os.close(terminal)


def test_a_pipe_ends_when_the_job_closes_it(forks: Forks, tmp_path: Path) -> None:
    ours, its = os.pipe()
    script = tmp_path / "script.py"
    script.write_text(f"import os, time; os.write({its}, b'x'); os.close({its}); time.sleep(300)")
    environment = Place(tmp_path).environment() | {"OMP_NUM_THREADS": "1"}
    client = subprocess.Popen([forks.python, script], env=environment, pass_fds=[its])
    os.close(its)
    with os.fdopen(ours, "rb") as pipe:
        assert pipe.read() == b"x"
    client.kill()
    client.wait()


def test_a_job_has_its_own_modules_and_its_own_randomness(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "other" / "retort").mkdir(parents=True)
    (tmp_path / "other" / "retort" / "__init__.py").write_text("where = 'the changed one'")
    script = tmp_path / "script.py"
    (tmp_path / "other" / "sitecustomize.py").write_text("import sys; sys.came_first = 'yes'")
    script.write_text(
        "import sys, random; loaded = 'torch' in sys.modules\n"
        "import numpy, retort, torch; print(loaded, sys.came_first, retort.where, random.random(), "
        "numpy.random.rand(), torch.initial_seed())"
    )
    env = Place(tmp_path).environment() | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(tmp_path / "other")
    one, other = (
        subprocess.check_output([forks.python, script], env=env, text=True).rsplit(maxsplit=3)
        for _ in range(2)
    )
    assert one[0] == other[0] == "True yes the changed one"
    assert not set(one[1:]) & set(other[1:])


@pytest.mark.parametrize("reason", ["variable", "flag", "descriptors"])
def test_what_a_server_could_not_do_alike_is_done_by_the_interpreter(
    reason: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print('numpy' in sys.modules, os.getppid())")
    env, flags = Place(tmp_path).environment(), []
    if reason == "variable":
        env["HF_HOME"] = str(tmp_path)
    elif reason == "flag":
        flags = ["-B"]
    many = [os.dup(0) for _ in range(300 if reason == "descriptors" else 0)]
    served = Place(tmp_path).environment()
    with closing(Forks(tmp_path / "forks", served, sources=REPOSITORY / "src")) as forks:
        said = subprocess.check_output(
            [forks.python, *flags, script], env=env, pass_fds=many, text=True
        )
    assert len(forks.refused) == (reason == "variable"), "the others do not even ask"
    for descriptor in many:
        os.close(descriptor)
    assert said.split() == ["False", str(os.getpid())]


def test_what_a_place_sets_for_its_commands_is_not_set_for_the_next_test(
    inputs: Place, fresh: Place
) -> None:
    fresh.env["HF_HOME"] = str(fresh.path)
    assert "HF_HOME" in fresh.environment() and "HF_HOME" not in inputs.environment()


@pytest.mark.parametrize("way", ["closed", "killed"])
def test_when_the_servers_owner_ends_so_does_all_of_it(way: str, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    code = (
        f"import os, subprocess, sys; sys.path.insert(0, {str(REPOSITORY / 'tests')!r})\n"
        "from support.forks import Forks; from pathlib import Path\n"
        f"forks = Forks(Path('forks').absolute(), os.environ, sources=Path({str(REPOSITORY / 'src')!r}))\n"
        "job = subprocess.Popen([forks.python, 'waits.py'], stdout=subprocess.PIPE, text=True)\n"
        "print(job.pid, job.stdout.readline(), flush=True)\n"
        "sys.stdin.read(); forks.close()"
    )
    environment = Place(tmp_path).environment()
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None and owner.stdin is not None
    there = list(map(int, owner.stdout.readline().split()))
    assert len(there) == 4 and all(map(is_there, there))
    if way == "killed":
        owner.kill()
    owner.stdin.close()
    owner.wait(timeout=60)
    wait_until(lambda: not any(map(is_there, there)))
    assert owner.returncode == (0 if way == "closed" else -signal.SIGKILL)
