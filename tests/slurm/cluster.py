"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, each node with a
host name of its own; started, asked, and ended without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare")
INSTALL = (
    "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge "
    "(services need not run)"
)
NODES = ("node1", "node2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# Eight empty files stand for the GPUs that the shipped scripts ask for.
# Short times: the real ones are minutes. Everything listens on the loopback address only.
CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld
SlurmdLogFile={base}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
JobRequeue=1
KillWait=5
CompleteWait=0
ReturnToService=2
MailProg=/bin/true
GresTypes=gpu
NodeName=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=128 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
NodeName=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=128 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES DefaultTime=5 MaxTime=UNLIMITED State=UP
"""
GRES = "NodeName=node[1-2] Name=gpu File={base}/gpu[0-7]\n"
HOSTS = "127.0.0.1 localhost node1 node2\n"
# A node: its own host name, and a hosts file in which all of them are this machine.
AS_NODE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


@dataclass
class Cluster:
    """A running Slurm; `base` is its directory, which has to have a short name (sockets)."""

    base: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.base / "slurm.conf")}

    def ask(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands."""
        return subprocess.run(
            words, env={**self.environment, **variables}, capture_output=True, text=True
        )

    def start(self) -> None:
        for name in ("munge", "state", "spool/node1", "spool/node2", "run", "log"):
            (self.base / name).mkdir(parents=True)
        for directory in (self.base, self.base / "munge"):  # munged wants its socket within reach
            directory.chmod(0o711)
        key = self.base / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        (self.base / "slurm.conf").write_text(CONFIG.format(base=self.base, ports=free_ports(3)))
        (self.base / "gres.conf").write_text(GRES.format(base=self.base))
        for number in range(8):
            (self.base / f"gpu{number}").touch()
        (self.base / "hosts").write_text(HOSTS)
        kinds = ("key", "pid", "seed", "log")
        files = [f"--{kind}-file={self.base}/munge/{kind}" for kind in kinds]
        socket_ = f"--socket={self.base}/munge/socket"
        self.begin("munged", ["munged", "--foreground", socket_, *files])
        wait_until((self.base / "munge" / "socket").exists, 10, "munged did not start")
        conf = str(self.base / "slurm.conf")
        self.begin("slurmctld", self.on("localhost", ["slurmctld", "-D", "-c", "-f", conf]))
        for node in NODES:
            self.begin(node, self.on(node, ["slurmd", "-D", "-f", conf]))
        ready = ["sinfo", "-h", "-N", "-o", "%t"]
        try:
            wait_until(lambda: self.ask(*ready).stdout.split() == ["idle", "idle"], 60)
        except TimeoutError:
            logs = "\n".join(file.read_text() for file in (self.base / "log").iterdir())
            raise RuntimeError(f"the nodes did not become idle:\n{logs}") from None

    def on(self, host: str, words: Sequence[str]) -> list[str]:
        hosts = str(self.base / "hosts")
        return ["unshare", "--uts", "--mount", "sh", "-c", AS_NODE, "sh", host, hosts, *words]

    def begin(self, name: str, words: Sequence[str]) -> None:
        with (self.base / "log" / f"{name}.out").open("wb") as out:
            self.daemons.append(
                subprocess.Popen(
                    words,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=self.base,
                )
            )

    def stop(self) -> list[str]:
        """Ends jobs, daemons, and what is left of them; returns what even KILL did not end."""
        if len(self.daemons) > 1:
            self.cancel_all()
        for daemon in reversed(self.daemons):  # munged last
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            with suppress(TimeoutError):
                wait_until(lambda: not self.processes(), 3)
        return list(self.processes().values())

    def cancel_all(self) -> None:
        if jobs := self.ask("squeue", "-h", "-o", "%A").stdout.split():
            self.ask("scancel", *set(jobs))
        with suppress(TimeoutError):
            wait_until(lambda: not self.ask("squeue", "-h").stdout, 30)

    def processes(self, job: str = "") -> dict[int, str]:
        """pid -> command line of every process of our daemons and jobs (of one job), by the
        environment that they inherited."""
        conf = f"SLURM_CONF={self.base}/slurm.conf".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                ours = f"SLURM_JOB_ID={job}".encode() in variables if job else conf in variables
                if conf in variables and ours:
                    found[int(entry.name)] = words
        return found

    # ------------------------------------------------------------ jobs

    def submit(self, *words: str, cwd: Path, **variables: str) -> str:
        """The id of a new job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
            env={**self.environment, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.ask("scontrol", "show", "job", "--oneliner", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, seconds: float = 120) -> tuple[str, int]:
        """(state, exit code) of a job that has ended."""
        wait_until(
            lambda: self.facts(job).get("JobState") in ENDED, seconds, f"job {job} did not end"
        )
        facts = self.facts(job)
        return facts["JobState"], int(facts["ExitCode"].partition(":")[0])


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = Cluster(base)
    try:
        cluster.start()
        yield cluster
    finally:
        left = cluster.stop()
        assert not left, left
        shutil.rmtree(base, ignore_errors=True)


def why_not() -> str:
    """Why no cluster can run here; nothing where one can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} missing: {INSTALL}"
    return "" if os.geteuid() == 0 else "a cluster of two host names needs root (unshare)"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(condition: Callable[[], object], seconds: float, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what or "waited in vain")
        time.sleep(0.1)
