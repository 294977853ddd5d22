"""`make fleet HOSTS=8`: hosts on this machine to look at, and what happens to machines as commands."""

import argparse
import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hosts.fleet import Fleet

HELP = """\
  kill N | boot N | reboot N       power off (all of it dies at once) | on | off and on
  stop N | kill-worker N | start N its worker: stop it, kill -9, start it; sandboxes go on
  cut N | join N                   pull its cable | put it back
  slow N 100ms [2%] | slow N 256kbit | fast N      delay and loss | rate, both ways | as before
  on N COMMAND…                    a command on the host, such as: on 3 ip addr; on 3 bash
  live                             living sandboxes of each host, by processes
  audit [N…]                       the audits of hosts that are on
  help | quit                      or Ctrl-C: everything goes, and nothing stays
  anything else                    a sandbatch command from a machine that is no host, such as:
                                   hosts | run --count 20 --wait -- sleep 60 | ls | drain h3 | resume h3
                                   batch FILE | wait --batch NAME | rm --all"""


class Prompt:
    """The commands of a person who looks at a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.verbs: dict[str, Callable[[str], None]] = {
            "kill": fleet.kill,
            "boot": fleet.boot,
            "reboot": fleet.reboot,
            "stop": fleet.stop_worker,
            "kill-worker": fleet.kill_worker,
            "start": fleet.start_worker,
            "cut": fleet.cut,
            "join": fleet.join,
            "fast": fleet.fast,
        }

    def obey(self, line: str) -> bool:
        """Carry one line out; False when it says to go."""
        try:
            words = shlex.split(line)
            if words[:1] in (["quit"], ["exit"]):
                return False
            if words:
                self._carry_out(words)
        except KeyboardInterrupt:
            print()  # it ended the command, which had it too
        except (
            AssertionError,
            NotImplementedError,
            ValueError,
            OSError,
            subprocess.SubprocessError,
        ) as error:
            print(f"{type(error).__name__}: {error}")
        return True

    def _carry_out(self, words: list[str]) -> None:
        verb, *rest = words
        fleet = self.fleet
        if verb == "help":
            print(HELP)
        elif verb in self.verbs:
            for word in rest:
                self.verbs[verb](self._name(word))
        elif verb == "slow" and len(rest) > 1:
            name, *how = self._name(rest[0]), *rest[1:]
            loss = next((one for one in how if one.endswith("%")), "")
            rate = next((one for one in how if one.endswith("bit")), "")
            delay = next((one for one in how if one not in (loss, rate)), "")
            fleet.slow(name, delay, loss, rate)
        elif verb == "on" and len(rest) > 1:
            host = fleet.hosts[self._name(rest[0])]
            subprocess.run(host.on().enter(*rest[1:]), env=host.environment, check=False)
        elif verb == "live":
            print("  ".join(f"{name} {count}" for name, count in fleet.live().items()))
        elif verb == "audit":
            print("\n".join(fleet.audits(*map(self._name, rest))) or "clean")
        else:
            subprocess.run(fleet.client_argv(*words), env=fleet.client_environment, check=False)

    def _name(self, word: str) -> str:
        name = word if word.startswith("h") else f"h{word}"
        if name not in self.fleet.hosts:
            raise ValueError(f"no host {word}: there are {', '.join(self.fleet.hosts)}")
        return name


def lines() -> Iterator[str]:
    """The lines that a person types, or a program writes.

    Not by `input`: a Ctrl-C in the moment between its prompt and its read would not be seen before
    the next line.
    """
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    text = b""
    while True:
        with contextlib.suppress(BlockingIOError):
            os.read(reader, 4096)  # of a Ctrl-C that ended a command
        print("fleet> ", end="", flush=True)
        while b"\n" not in text:
            if reader in select.select([sys.stdin, reader], [], [])[0]:
                return
            more = os.read(sys.stdin.fileno(), 65536)
            if not more:
                return
            text += more
        line, _, text = text.partition(b"\n")
        yield line.decode(errors="replace")


def write_wrapper(fleet: Fleet) -> Path:
    """A program that is `sandbatch` for this fleet, for other terminals."""
    path = fleet.folder / "sandbatch"
    env = {name: fleet.client_environment[name] for name in ("PYTHONPATH", "SANDBATCH_BROKER_URL")}
    words = ["env", *(f"{name}={value}" for name, value in env.items()), *fleet.client_argv()]
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    path.chmod(0o700)  # it has the broker's password
    return path


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fleet", description=__doc__)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--capacity", type=int, help="sandboxes at a time, of each host")
    parser.add_argument("--slots", type=int, default=2, help="launches at a time, of each host")
    given = parser.parse_args()
    if os.geteuid() != 0:
        print("make fleet: root is needed", file=sys.stderr)
        return 2
    env = {"SANDBATCH_SLOTS": str(given.slots)}
    if given.capacity:
        env["SANDBATCH_CAPACITY"] = str(given.capacity)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="sandbatch-fleet-"))
    print(f"{given.hosts} hosts, a bridge and a broker come up in {folder} …", flush=True)
    try:
        with Fleet(folder, given.hosts, **env) as fleet:
            print(f"up. From another terminal, as root: {write_wrapper(fleet)} hosts\n{HELP}", flush=True)
            all(map(Prompt(fleet).obey, lines()))
    except KeyboardInterrupt:
        pass  # it is how it ends
    return 0


if __name__ == "__main__":
    sys.exit(main())
