"""A machine in the machine: network, mount, host name and process namespaces that one process holds.

Nothing of it has a name outside. Its first process reads a pipe of ours and ends when that closes:
with whoever made the box, however that ends, the kernel kills every process in it, and with the last
of them its links, mounts and network namespaces go.
"""

import os
import select
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NAMESPACES = ("--net", "--mount", "--uts", "--pid")
# The first process of a box: init, as far as a box needs one. tini reaps, `cat` waits for the pipe's end.
INIT = """
set -e
echo "$BOX_NAME" > /proc/sys/kernel/hostname
ip link set lo up
{script}
echo ready
exec tini -- cat > /dev/null
"""


@dataclass
class Box:
    """A box that is up. `pid` is that of its first process, as this machine counts."""

    name: str
    pid: int
    holder: "subprocess.Popen[bytes]"
    children: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def enter(self, *argv: str) -> list[str]:
        """The command line that runs `argv` in the box."""
        return ["nsenter", f"--target={self.pid}", *NAMESPACES, "--", *argv]

    def path(self, path: str) -> Path:
        """A path of the box as this machine reaches it, while the box is up."""
        return Path(f"/proc/{self.pid}/root{path}")

    def run(
        self, *argv: str, env: Mapping[str, str] | None = None, check: bool = True, timeout_s: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in the box to its end."""
        done = subprocess.run(
            self.enter(*argv), capture_output=True, text=True, timeout=timeout_s, env=env, check=False
        )
        assert not check or done.returncode == 0, f"{self.name}: {argv}: {done.stdout}{done.stderr}"
        return done

    def spawn(self, *argv: str, log: Path, env: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
        """Start a command in the box; it dies with the box."""
        with log.open("ab") as file:
            # A session of its own: Ctrl-C is for who holds the box.
            child = subprocess.Popen(
                self.enter(*argv),
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, start_new_session=True,
            )  # fmt: skip
        self.children.append(child)
        return child

    def holds(self, pid: int) -> bool:
        """Whether a process of this machine lives in the box, or an ancestor of it does.

        Newer runscs give their sandbox a process namespace of its own, below the box's.
        """
        own = os.stat(f"/proc/{self.pid}/ns/pid")
        while pid > 1:
            try:
                if os.path.samestat(os.stat(f"/proc/{pid}/ns/pid"), own):
                    return True
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                break  # it has just ended
        return False

    def kill(self) -> None:
        """Everything in it dies at once, as by a power cut. Safe to repeat; returns when all is gone."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            handle = -1
        if handle >= 0:
            try:
                if self.holder.poll() is None:  # else the pid may be another's by now
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    # The kernel lets the first process of a namespace end last.
                    select.select([handle], [], [], 30)
            except ProcessLookupError:
                pass  # it has just ended by itself
            finally:
                os.close(handle)
        if self.holder.stdin is not None:
            self.holder.stdin.close()
        self.holder.wait(30)
        for child in self.children:
            child.wait(30)
        self.children.clear()


def begin_box(name: str, script: str, log: Path, **words: str) -> "subprocess.Popen[bytes]":
    """Begin to make a box; `script` prepares it from inside, with `words` in its environment."""
    unshare = ("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation=private")
    with log.open("ab") as file:  # when a box is killed, unshare says "sigprocmask unblock failed"
        return subprocess.Popen(
            [*unshare, "sh", "-c", INIT.format(script=script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
            env={**os.environ, **words, "BOX_NAME": name}, start_new_session=True,
        )  # fmt: skip


def finish_box(name: str, holder: "subprocess.Popen[bytes]") -> Box:
    """Wait until a box that was begun is there."""
    assert holder.stdout is not None
    with holder.stdout as said:
        assert said.readline() == b"ready\n", f"box {name} was not made: see its log"
    (pid,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    return Box(name, int(pid), holder)
