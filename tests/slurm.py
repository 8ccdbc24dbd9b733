"""A Slurm cluster of this one machine for as long as a test lasts: its daemons in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue")

_CONFIGURATION = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1
MinJobAge=600
KillWait=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""
#: submitit asks sacct what became of a job. That needs accounting: here the controller answers. It forgets tasks of an
#: array that were cancelled before they began.
_SACCT = """#!/bin/sh
echo 'JobID|State|NodeList'
scontrol show job -o | sed -nE \
 's/^JobId=([0-9]+) .*ArrayJobId=([0-9]+) ArrayTaskId=([0-9]+) .*JobState=([A-Z_]+) .*/\\2_\\3|\\4|here/p; t
  s/^JobId=([0-9]+) .*JobState=([A-Z_]+) .*/\\1|\\2|here/p'
"""


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    lost = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if lost:
        return f"no {lost[0]}: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.getuid() == 0 else "its daemons want to be started by root"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons; gives the environment in which its commands find them."""
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "bin" / "sacct").write_text(_SACCT)
    (folder / "bin" / "sacct").chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    text = _CONFIGURATION.format(host=socket.gethostname().split(".")[0], ports=_free_ports(2), folder=folder)
    (folder / "slurm.conf").write_text(text)
    path = f"{folder / 'bin'}:{os.environ['PATH']}:/usr/sbin"
    env = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
              f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed",
              "--num-threads=2"]  # fmt: skip
    daemons: list[subprocess.Popen[bytes]] = []
    with open(folder / "daemons.log", "wb") as log:
        try:
            for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
                daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
                time.sleep(1)
            _wait_until_idle(env, folder)
            yield env
        finally:
            subprocess.run(["scancel", "--user=root"], env=env, check=False, timeout=30)
            for daemon in reversed(daemons):
                daemon.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(timeout=20)
                daemon.kill()


def _wait_until_idle(env: dict[str, str], folder: Path) -> None:
    for _ in range(120):
        seen = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True, check=False)
        if seen.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "\n".join(file.read_text(errors="replace")[-1500:] for file in sorted(folder.glob("*.log")))
    raise AssertionError(f"the cluster did not come up: {seen.stdout}{seen.stderr}\n{logs}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        opened = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in opened:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in opened]
