"""A real Slurm on this machine: two virtual nodes of two cores on loopback, as the present user, without systemd."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=600
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def is_installed() -> bool:
    """Whether Slurm and munge are here (Debian: slurm-wlm, munge)."""
    return all(shutil.which(name) for name in PROGRAMS)


class Cluster:
    """Starts with the object, ends with `stop`; `environment` is what its clients need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
        host = socket.gethostname().partition(".")[0]
        config = CONFIG.format(host=host, user=getpass.getuser(), folder=folder, ports=ports)
        (folder / "slurm.conf").write_text(config)
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
        munge = ["munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
        munge += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log"]
        self.run(*munge, f"--seed-file={folder}/munged.seed")
        self.run("slurmctld", "-c")
        for node in ("n1", "n2"):
            self.run("slurmd", "-c", "-N", node)

    def run(self, *words: str) -> str:
        """What a program of Slurm prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout.strip()

    def submit(self, *words: str, cwd: Path) -> str:
        """Number of a job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words], env=self.environment, cwd=cwd, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED and so on; of the first task of an array."""
        shown = self.run("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].partition(" ")[0]

    def wait(self, job: str, states: tuple[str, ...], seconds: float = 800) -> str:
        """Wait until a job is in one of these states."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, f"job {job} is still {state}"
            time.sleep(0.5)
        return state

    def stop(self) -> None:
        """End its jobs and programs."""
        subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, timeout=60)
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged"):
            pid = self.folder / f"{name}.pid"
            if pid.exists():
                os.kill(int(pid.read_text()), signal.SIGTERM)
