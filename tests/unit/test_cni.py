"""What a CNI plugin sees of us, compared with what it saw of cnitool on the same networks."""

import json
from pathlib import Path

import pytest

from tests.unit.libcni.cases import CASES, CONTAINER_ID, NETNS, Case, observe
from worker.cni import Attachment, CniRuntime
from worker.cni_config import find_network
from worker.errors import SandbatchError

RECORDINGS = json.loads((Path(__file__).parent / "libcni/recordings.json").read_text())


def run_ours(case: Case, folder: Path) -> list[dict[str, object]]:
    cache_dir = folder / "cache"
    plugins = case.prepare(folder, cache_dir)
    runtime = CniRuntime((plugins.folder,), cache_dir, folder / "lock", timeout_s=30)
    pairs = [pair.split("=") for pair in case.cni_args.split(";") if pair]
    attachment = Attachment(
        CONTAINER_ID, Path(NETNS), case.if_name, tuple((a, b) for a, b in pairs), case.capability_args
    )
    seen = []
    for step in case.steps:
        failed, result = False, None
        try:
            network = find_network(case.name, [folder / "net.d"])
            if step == "ADD":
                result = runtime.cni_add(network, attachment)
            elif step == "DEL":
                runtime.cni_del(network, attachment)
            elif step == "CHECK":
                runtime.cni_check(network, attachment)
            elif step == "STATUS":
                runtime.cni_status(network)
            elif step == "GC":
                failed = runtime.cni_gc(network, None) != []
        except SandbatchError:
            failed = True
        seen.append(observe(plugins, cache_dir, failed=failed, result=result))
    return seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.about)
def test_the_plugins_see_what_they_saw_of_cnitool(case, tmp_path):
    """Order, environment, stdin, results, the cache: who changes the runtime must not notice."""
    ours = run_ours(case, tmp_path)
    for step, mine, theirs in zip(case.steps, ours, RECORDINGS[case.about], strict=True):
        assert mine == theirs, f"after {step}"
