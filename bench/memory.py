"""What processes have of the machine's memory: shared pages are divided among those that share them."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

WORKER_KINDS = ("worker", "pool", "tini")  # of sandbatch's own; the others are the price of a sandbox


@dataclass(frozen=True)
class Process:
    """A process, and in bytes: what it has, its share of that (PSS), what is its own alone."""

    pid: int
    kind: str
    rss: int
    pss: int
    private: int


def read_rollup(text: str) -> tuple[int, int, int]:
    """RSS, PSS and private bytes from the text of /proc/PID/smaps_rollup.

    PSS is RSS with each page divided by the number of processes that have it, so it can be added up.
    """
    sizes = {}
    for line in text.splitlines()[1:]:
        name, _, size = line.partition(":")
        sizes[name] = int(size.split()[0]) * 1024
    return sizes["Rss"], sizes["Pss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


def kind_of(words: str, parent: str) -> str:
    """What a process of a host is, by its command line and by the kind of its parent."""
    program = words.partition(" ")[0].rpartition("/")[2]
    if program in ("tini", "conmon"):
        return program
    if program.startswith("runsc"):
        return "gofer" if "gofer" in words.split(" --", 1)[0] or " gofer" in words else "sandbox"
    if parent in ("sandbox", "gofer"):
        return parent  # what runs in it, by systrap
    if program.startswith(("valkey-server", "redis-server")):
        return "broker"
    if program.startswith("python") and " -m cli worker" in words:
        return "pool" if parent in ("worker", "pool") else "worker"
    return "other"


def tree(pid: int) -> Iterator[tuple[int, str]]:
    """The kinds of a process and of all below it; who ends meanwhile is left out."""
    ahead = [(pid, "")]
    while ahead:
        one, parent = ahead.pop()
        folder = Path(f"/proc/{one}")
        try:
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            kind = kind_of(words, parent)
            # Each thread has its own children.
            children = [
                child for task in folder.glob("task/*/children") for child in task.read_text().split()
            ]
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield one, kind
        ahead += [(int(child), kind) for child in children]


def measure(pid: int, kinds: Collection[str] = ()) -> list[Process]:
    """A process and all below it, or those of `kinds`."""
    found = []
    for one, kind in tree(pid):
        if kinds and kind not in kinds:
            continue
        try:
            rss, pss, private = read_rollup(Path(f"/proc/{one}/smaps_rollup").read_text())
        except (FileNotFoundError, ProcessLookupError, KeyError):
            continue  # it has just ended, or is ending
        found.append(Process(one, kind, rss, pss, private))
    return found
