"""A real SLURM cluster on one machine: 4 nodes of 4 pretended GPUs, and ways to break it.

Controller, node daemons and commands are SLURM's own; what is pretended is the hardware. Each node is a UTS namespace
with a host name and an address of its own, so that jobs on two nodes know each other as two machines do. No
accounting: users of small clusters have none, and `squeue` says enough. To be started inside cluster.sh.
"""

import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

NODES = ("node1", "node2", "node3", "node4")
GPUS = 4  # of each node
CPUS = 32
_PATIENCE_S = 600

# Partition `scavenge` is preempted by the other two. A killed node is missed after some 10 s, a job at its time limit
# gets SIGTERM (SLURM looks every 30 s) and 5 s later SIGKILL. All listen at every address of the machine, hence the
# ports: an srun that listens at one address would not be heard by a step on another node.
_CONFIG = """\
ClusterName=retort
SlurmctldHost=login
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
KillWait=5
SlurmdTimeout=5
SlurmctldTimeout=5
MinJobAge=3600
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-4] Port=[17001-17004] CPUs={cpus} RealMemory=1000000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES DefaultTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=ALL DefaultTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=scavenge Nodes=ALL DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
"""


@dataclass(frozen=True)
class Job:
    """A job as squeue shows it; `comment` is Snakemake's: rule_<rule>_wildcards_<their values>, _-separated."""

    id: str
    state: str
    node: str
    partition: str
    folder: str  # in which it runs
    comment: str


@dataclass(frozen=True)
class Cluster:
    """A cluster whose files lie in a folder."""

    folder: Path

    def start(self) -> None:
        """Start every daemon and wait until all nodes are idle. Raises RuntimeError with the logs when they are not."""
        for name in ("munge", "state", "spool", "dev", "etc"):
            (self.folder / name).mkdir(exist_ok=True)
        (self.folder / "munge").chmod(0o755)
        (self.folder / "munge" / "key").write_bytes(os.urandom(128))
        (self.folder / "munge" / "key").chmod(0o600)
        text = _CONFIG.format(folder=self.folder, gpus=GPUS, cpus=CPUS)
        (self.folder / "etc" / "slurm.conf").write_text(text)
        (self.folder / "etc" / "gres.conf").write_text(f"Name=gpu File={self._make_devices()}\n")
        self._start_munge()
        self.start_controller("-c")
        for node in NODES:
            self.restore(node)
        self.wait_until(lambda: set(self.nodes().values()) == {"idle"}, "all nodes are idle")

    def _make_devices(self) -> str:
        """Make character devices: SLURM gives nothing else to a job as its GPUs."""
        for number in range(GPUS):
            device = self.folder / "dev" / f"gpu{number}"
            try:
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            except PermissionError:
                return f"/dev/tty[0-{GPUS - 1}]"
        return f"{self.folder}/dev/gpu[0-{GPUS - 1}]"

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        words = ["munged", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key"]
        words += [f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
        subprocess.run(words, check=True, capture_output=True)

    def start_controller(self, *flags: str) -> None:
        """Start slurmctld; with its state of before, unless told otherwise."""
        subprocess.run(["slurmctld", *flags], check=True, capture_output=True)
        self.wait_until(lambda: "is UP" in self.try_run("scontrol", "ping"), "the controller is up")

    def kill_controller(self) -> None:
        """End slurmctld as a crash of its machine does."""
        os.kill(int((self.folder / "slurmctld.pid").read_text()), signal.SIGKILL)

    def restore(self, node: str) -> None:
        """Start a node, or start it again after a crash."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        daemon = f"hostname {node} && exec slurmd -N {node}"
        subprocess.run(["unshare", "--uts", "sh", "-c", daemon], check=True, capture_output=True)

    def crash(self, node: str) -> int:
        """End all that runs on a node at once, as its loss of power would; returns how many processes that were."""
        daemon = int((self.folder / f"slurmd.{node}.pid").read_text())
        machine = _machine(daemon)
        found = [p for p in _processes() if _machine(p) == machine]
        for how in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: nobody tells of another's end
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, how)
        return len(found)

    def run(self, *command: str) -> str:
        """Run one of SLURM's commands, which must succeed; return what it said."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def try_run(self, *command: str) -> str:
        """Run one of SLURM's commands; return what it said, however it ended."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    def nodes(self) -> dict[str, str]:
        """Return every node's state; a `*` stands behind that of one that does not answer."""
        lines = self.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %t").splitlines()
        return dict(line.split() for line in lines)

    def jobs(self, *, folder: Path | None = None, rule: str = "", states: str = "all") -> list[Job]:
        """Return Snakemake's jobs in the order of their submission; those of one project, of one rule, where named."""
        form = "%i|%T|%N|%P|%Z|%k"
        said = self.run("squeue", "-h", "--states", states, "-o", form, "--sort", "i")
        found = [Job(*line.split("|", 5)) for line in said.splitlines()]
        return [
            job
            for job in found
            if folder in (None, Path(job.folder)) and job.comment.startswith(f"rule_{rule}")
        ]

    def state(self, job_id: str) -> str:
        """Return the state of a job."""
        return self.run("squeue", "-h", "--states", "all", "-j", job_id, "-o", "%T").strip()

    def wait_for(self, state: str, *job_ids: str) -> None:
        """Wait until jobs are in a state."""
        for job_id in job_ids:
            in_state = partial(self._is_in, state, job_id)
            self.wait_until(in_state, f"job {job_id} is {state}")

    def _is_in(self, state: str, job_id: str) -> bool:
        return self.state(job_id) == state

    def hurry(self, job_id: str) -> None:
        """Let a requeued job start now: SLURM waits two minutes."""
        self.run("scontrol", "update", f"jobid={job_id}", "StartTime=now")

    def drain(self) -> None:
        """Let no node take a job."""
        for node in NODES:
            self.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=full")

    def resume(self) -> None:
        """Let every node that was drained take jobs again."""
        for node in NODES:
            self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def settle(self) -> None:
        """Cancel every job and forget it, bring every node back, and wait until the cluster is as it was."""
        if not self._is_alive("slurmctld"):
            self.start_controller()
        self.try_run("scancel", "--full", "--user", "root")
        for node in NODES:
            if not self._is_alive(f"slurmd.{node}"):
                self.restore(node)
            self.try_run("scontrol", "update", f"nodename={node}", "state=resume")
        self.wait_until(lambda: set(self.nodes().values()) == {"idle"}, "all nodes are idle again")

    def _is_alive(self, daemon: str) -> bool:
        process = (self.folder / f"{daemon}.pid").read_text().strip()
        with suppress(OSError):
            return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
        return False

    def wait_until(
        self,
        condition: Callable[[], object],
        what: str,
        *,
        process: "subprocess.Popen[bytes] | None" = None,
    ) -> None:
        """Wait until a condition holds.

        Raises RuntimeError with the daemons' last words when it does not for long, or a process ends before. A look
        that takes long, as by one of SLURM's commands, is not repeated at once: it would take a third of a core.
        """
        until = time.monotonic() + _PATIENCE_S
        while True:
            began = time.monotonic()
            if condition():
                return
            took_s = time.monotonic() - began
            has_ended = process is not None and process.poll() is not None
            if has_ended or time.monotonic() > until:
                logs = self.folder.glob("*.log")
                ends = [f"--- {log}\n{log.read_text()[-800:]}" for log in logs]
                raise RuntimeError(f"waited in vain until {what}\n" + "\n".join(ends))
            time.sleep(min(max(0.02, 10 * took_s), 0.3))


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _machine(process: int) -> str:
    """Return the UTS namespace of a process: the node that it is on."""
    with suppress(OSError):
        return str(Path(f"/proc/{process}/ns/uts").readlink())
    return ""
