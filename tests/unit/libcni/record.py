"""Record what cnitool, and with it libcni, makes of every case: `python -m tests.unit.libcni.record CNITOOL`.

Run by hand when the cases change, as root, in a mount namespace with an empty /var/lib/cni (cnitool
knows no other cache): `unshare --mount sh -c 'mount -t tmpfs none /var/lib/cni && exec "$@"' sh python …`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.unit.libcni.cases import CASES, NETNS, Case, observe

CACHE_DIR = Path("/var/lib/cni")
RECORDINGS = Path(__file__).with_name("recordings.json")


def run_cnitool(cnitool: str, case: Case, folder: Path) -> list[dict[str, object]]:
    """Run the steps of a case; `folder` is a new one."""
    shutil.rmtree(CACHE_DIR / "results", ignore_errors=True)
    plugins = case.prepare(folder, CACHE_DIR)
    env = {
        "PATH": os.environ["PATH"],
        "NETCONFPATH": str(folder / "net.d"),
        "CNI_PATH": str(plugins.folder),
        "CNI_IFNAME": case.if_name,
        "CNI_ARGS": case.cni_args,
        "CAP_ARGS": json.dumps(case.capability_args) if case.capability_args else "",
    }
    seen = []
    for step in case.steps:
        argv = [cnitool, step.lower(), case.name, NETNS]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        failed = done.returncode != 0
        result = json.loads(done.stdout) if step == "ADD" and not failed else None
        seen.append(observe(plugins, CACHE_DIR, failed=failed, result=result))
    return seen


def main(cnitool: str) -> None:
    if list(CACHE_DIR.glob("*")):
        sys.exit(f"{CACHE_DIR} is not empty: see the docstring")
    recordings = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            recordings[case.about] = run_cnitool(cnitool, case, Path(folder))
    lines = [f"{json.dumps(about)}: {json.dumps(seen)}" for about, seen in recordings.items()]
    RECORDINGS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
