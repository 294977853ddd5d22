"""A CNI runtime: the plugins of a network run as libcni runs them (CNI.md has the sources).

ADD first to last, DEL last to first, each call with the environment and stdin of libcni; the final
result is kept in libcni's cache.
"""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worker import cni_cache, process
from worker.cni_config import VERSIONS, Network
from worker.cni_json import loads
from worker.cni_result import converted, result_ips, typed
from worker.errors import BadInput, BadNetwork, CniPluginError, SandbatchError
from worker.netns import remove_half_made, world_put_back
from worker.settings import Settings

__all__ = ["Attachment", "CniRuntime", "result_ips"]

BUSY_TRIES, BUSY_PAUSE_S = 6, 1.0  # as libcni: a plugin that is being upgraded (text file busy)
LOST_CHAIN = re.compile(
    r"running \[(?P<iptables>\S*ip6?tables) -t (?P<table>\w+) -D "
    r".*[Cc]hain '(?P<chain>CNI-[0-9a-f]{24})' does not exist",
    re.DOTALL,
)
NO_ERROR_CODE = 0  # the plugin ended with an error that is not in CNI's form
CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")  # any runtime's, not only ours
IF_NAME = re.compile(r"(?!\.\.?$)[^/:\s]+")
IF_NAME_BYTES = 15  # Linux: IFNAMSIZ, without the closing zero


@dataclass(frozen=True)
class Attachment:
    """One link of one sandbox on a network. `capability_args` by capability, as libcni's.

    `netns_path` is `Path()` where the netns is not known any more: DEL may do without.
    """

    container_id: str
    netns_path: Path
    if_name: str = "eth0"
    cni_args: tuple[tuple[str, str], ...] = ()
    capability_args: dict[str, Any] = field(default_factory=dict)

    @property
    def netns(self) -> str:
        """CNI_NETNS."""
        return "" if self.netns_path == Path() else str(self.netns_path)


_NOBODY = Attachment("", Path(), if_name="")  # GC and STATUS concern no attachment
_OLD_PLUGIN = Attachment("", Path("dummy"), if_name="dummy")  # which wants a netns even for VERSION


@dataclass(frozen=True)
class CniRuntime:
    """The fields hold for every call; `timeout_s` is the longest run of one plugin."""

    plugin_path: tuple[Path, ...]
    cache_dir: Path
    lock_path: Path
    timeout_s: float

    @classmethod
    def from_settings(cls, settings: Settings) -> "CniRuntime":
        lock_path = settings.run_dir / "cni.lock"
        return cls(settings.cni_paths, settings.cni_cache_dir, lock_path, settings.cni_timeout_s)

    def cni_add(self, network: Network, attachment: Attachment) -> dict[str, Any]:
        """Attach; returns the final result, which is then in the cache. After an error DEL is still due.

        Raises:
            BadInput: The container id or the interface's name is none.
            CniPluginError: A plugin reported an error; those after it did not run.
            ProcessTimeout: A plugin hung and was killed.
        """
        _check_names(attachment)
        result: dict[str, Any] | None = None
        with self._locked(fcntl.LOCK_SH):
            for plugin in network.plugins:
                stdin = _stdin(network, plugin, attachment, result)
                answer = self._run("ADD", plugin["type"], attachment, stdin)
                result = _result("ADD", plugin["type"], attachment, answer, network.cni_version)
            assert result is not None  # noqa: S101 - a network has at least one plugin
            cni_cache.save(
                self.cache_dir,
                network=network.name,
                container_id=attachment.container_id,
                if_name=attachment.if_name,
                netns=attachment.netns,
                config=network.raw,
                cni_args=attachment.cni_args,
                capability_args=attachment.capability_args,
                result=result,
            )
        return result

    def add_calls(self, network: Network, attachment: Attachment, prev_result: Any) -> list[dict[str, Any]]:
        """What `cni_add` would run, one call a plugin; `prev_result` stands for what nobody can know yet.

        Of the environment only CNI's variables: the rest is the worker's own.
        """
        _check_names(attachment)
        env = self._environment("ADD", attachment, None)
        return [
            {
                "command": "ADD",
                "plugin": plugin["type"],
                "env": {name: value for name, value in env.items() if name.startswith("CNI_")},
                "stdin": _stdin(network, plugin, attachment, prev_result if number else None),
            }
            for number, plugin in enumerate(network.plugins)
        ]

    def cni_del(self, network: Network, attachment: Attachment, made: dict[str, Any] | None = None) -> None:
        """Detach. Safe to repeat, and after a failed or half-done ADD.

        Where ADD's result is cached, the plugins find the netns as ADD left it (`world_put_back`).
        `made` is what a caller knows of an ADD that never finished, as a result of CNI 1.0.

        Raises:
            CniPluginError: A plugin reported an error; those before it in the list did not run.
        """
        with self._locked(fcntl.LOCK_SH):
            self._del(network, attachment, made)

    def cni_check(self, network: Network, attachment: Attachment) -> None:
        """Ask each plugin whether the attachment is as ADD made it; nothing if the list disables it.

        Raises:
            CniPluginError: Something is not as it was.
            BadNetwork: The list's version has no CHECK.
            SandbatchError: The cache entry holds no result.
        """
        if not network.is_at_least("0.4.0"):
            raise BadNetwork(
                f"network {network.name}", f"CNI {network.cni_version} has no CHECK", "raise its cniVersion"
            )
        if network.disable_check:
            return
        with self._locked(fcntl.LOCK_SH):
            result = self._cached_result(network, attachment)  # none: the plugins say so better than we
            for plugin in network.plugins:
                self._run("CHECK", plugin["type"], attachment, _stdin(network, plugin, attachment, result))

    def cni_gc(self, network: Network, valid: Iterable[Attachment] | None) -> list[SandbatchError]:
        """Free what attachments hold that are not among `valid`, which must be all of that network on
        this host; goes on after errors and returns them.

        None means that none is valid, in libcni's older words: the plugins are not given the list.
        """
        if network.disable_gc:
            return []
        keep = [(one.container_id, one.if_name) for one in valid or ()]
        errors: list[SandbatchError] = []
        with self._locked(fcntl.LOCK_EX):
            for entry in cni_cache.list_entries(self.cache_dir):
                if entry.network == network.name and (entry.container_id, entry.if_name) not in keep:
                    with _collected(errors):
                        self._del(network, _attachment_of(entry))
            if network.is_at_least("1.1.0"):
                listed = [{"containerID": one, "ifname": if_name} for one, if_name in keep]
                both = {"cni.dev/valid-attachments": listed, "cni.dev/attachments": listed}
                for plugin in network.plugins:
                    stdin = _stdin(network, plugin, _NOBODY, None) | (both if valid is not None else {})
                    with _collected(errors):
                        self._run("GC", plugin["type"], _NOBODY, stdin)
        return errors

    def cni_status(self, network: Network) -> None:
        """Ask each plugin whether it can take an ADD; lists below 1.1.0 cannot be asked.

        Raises:
            CniPluginError: The first that cannot.
        """
        if network.is_at_least("1.1.0"):
            for plugin in network.plugins:
                self._run("STATUS", plugin["type"], _NOBODY, _stdin(network, plugin, _NOBODY, None))

    def cni_version(self, plugin: str) -> list[str]:
        """The CNI versions that a plugin supports.

        Raises:
            CniPluginError: It answers with an error, or with no list of versions.
        """
        try:
            answer = self._run("VERSION", plugin, _OLD_PLUGIN, {"cniVersion": VERSIONS[-1]}, path="dummy")
        except CniPluginError as error:
            if error.msg == "unknown CNI_COMMAND: VERSION":
                return ["0.1.0"]  # it is as old as that
            raise
        found = _object_of(answer)
        versions = found.get("supportedVersions")
        if isinstance(versions, list) and versions and found.get("cniVersion"):
            return [str(version) for version in versions]
        if found.get("cniVersion") == "0.2.0":
            return ["0.1.0", "0.2.0"]
        words = f"no list of versions; it printed {process.last_words(answer, 80)!r}"
        raise CniPluginError("VERSION", plugin, "", NO_ERROR_CODE, words)

    def missing_plugins(self, network: Network) -> list[str]:
        """Plugins that a network names and no plugin folder has, IPAM ones included."""
        names = []
        for plugin in network.plugins:
            ipam = plugin.get("ipam")
            names += [
                plugin["type"],
                *([ipam["type"]] if isinstance(ipam, dict) and ipam.get("type") else []),
            ]
        return [name for name in dict.fromkeys(names) if self._find(name) is None]

    def is_attached(self, network_name: str, attachment: Attachment) -> bool:
        return self._entry(network_name, attachment) is not None

    def _del(self, network: Network, attachment: Attachment, made: dict[str, Any] | None = None) -> None:
        result = self._result_for_del(network, attachment)
        # Below 0.4.0 the plugins get no prevResult; the netns is made as it was all the same.
        prev_result = result if network.is_at_least("0.4.0") else None
        with contextlib.ExitStack() as stack:
            if result is not None:
                made = converted(result, VERSIONS[-1])
            if made is None:  # nobody knows what ADD has made; the plugins go by the netns and the id
                remove_half_made(attachment.netns_path)
            else:
                stack.enter_context(world_put_back(attachment.netns_path, attachment.if_name, made))
            for plugin in reversed(network.plugins):
                self._run_del(plugin["type"], attachment, _stdin(network, plugin, attachment, prev_result))
        self._forget(network, attachment)

    def _run_del(self, plugin: str, attachment: Attachment, stdin: dict[str, Any]) -> None:
        """One plugin's DEL; a masquerade chain that somebody has taken away is put back first.

        The bridge plugin takes a missing rule for undone and a missing chain for an error, so that
        an `iptables -t nat -F` and `-X` by hand, or a firewall's reload, would end in a DEL that
        fails for ever (seen with 1.1.1 and iptables 1.8.9).
        """
        try:
            self._run("DEL", plugin, attachment, stdin)
        except CniPluginError as error:
            lost = LOST_CHAIN.search(error.msg)
            if lost is None:
                raise
            chain = [lost["iptables"], "--wait", "-t", lost["table"]]
            # If making it fails, so will the DEL, in its own words.
            process.run([*chain, "-N", lost["chain"]], timeout_s=self.timeout_s)
            try:
                self._run("DEL", plugin, attachment, stdin)
            finally:  # 1.1.1 stops at the missing rule and leaves the empty chain
                process.run([*chain, "-X", lost["chain"]], timeout_s=self.timeout_s)

    def _result_for_del(self, network: Network, attachment: Attachment) -> dict[str, Any] | None:
        try:
            return self._cached_result(network, attachment)
        except SandbatchError:  # an entry without a result helps nobody; DEL must go on
            if network.is_at_least("0.4.0"):  # below it libcni does not look
                self._forget(network, attachment)
            return None

    def _forget(self, network: Network, attachment: Attachment) -> None:
        cni_cache.forget(self.cache_dir, network.name, attachment.container_id, attachment.if_name)

    def _entry(self, network_name: str, attachment: Attachment) -> cni_cache.CacheEntry | None:
        return cni_cache.load(self.cache_dir, network_name, attachment.container_id, attachment.if_name)

    def _cached_result(self, network: Network, attachment: Attachment) -> dict[str, Any] | None:
        return cni_cache.load_result(
            self.cache_dir, network.name, attachment.container_id, attachment.if_name, network.cni_version
        )

    def _run(
        self,
        command: str,
        plugin: str,
        attachment: Attachment,
        stdin: dict[str, Any],
        path: str | None = None,
    ) -> str:
        """Run a plugin to its end and return what it printed."""
        binary = self._find(plugin)
        if binary is None:
            places = ":".join(map(str, self.plugin_path))
            words = f"not found in {places}; run sandbatch setup"
            raise CniPluginError(command, plugin, attachment.container_id, NO_ERROR_CODE, words)
        env = self._environment(command, attachment, path)
        words, point = json.dumps(stdin), f"cni.{plugin}.{command}"
        for tries_left in reversed(range(BUSY_TRIES)):
            done = process.run([binary], timeout_s=self.timeout_s, stdin=words, env=env, point=point)
            if not (tries_left and done.returncode in (126, 127) and "Text file busy" in done.stderr):
                break
            time.sleep(BUSY_PAUSE_S)  # nothing tells when the writer is done
        if done.returncode:
            code, msg = _plugin_error(done)
            raise CniPluginError(command, plugin, attachment.container_id, code, msg)
        return done.stdout

    def _environment(self, command: str, attachment: Attachment, path: str | None) -> dict[str, str]:
        """Ours, since plugins need PATH, without what may hold our secrets, and CNI's variables."""
        ours = process.without_own(os.environ)
        return ours | {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_NETNS": attachment.netns,
            "CNI_IFNAME": attachment.if_name,
            "CNI_ARGS": ";".join(f"{name}={value}" for name, value in attachment.cni_args),
            "CNI_PATH": ":".join(map(str, self.plugin_path)) if path is None else path,
        }

    def _find(self, plugin: str) -> Path | None:
        candidates = (folder / plugin for folder in self.plugin_path)
        return next((one for one in candidates if os.path.isfile(one)), None)

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """GC excludes every ADD and DEL of this host; these do not exclude each other."""
        self.lock_path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        handle = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, how)
            yield
        finally:
            os.close(handle)


def _check_names(attachment: Attachment) -> None:
    """As libcni does before an ADD (pkg/utils)."""
    container_id, if_name = attachment.container_id, attachment.if_name
    if not CONTAINER_ID.fullmatch(container_id):
        todo = "letters, digits, '_', '.', '-', a letter or digit first"
        raise BadInput(f"container id {container_id!r}", "is no CNI container id", todo)
    if not IF_NAME.fullmatch(if_name) or len(os.fsencode(if_name)) > IF_NAME_BYTES:
        todo = f"1 to {IF_NAME_BYTES} characters without '/', ':' and spaces"
        raise BadInput(f"interface {if_name!r}", "is no name of an interface", todo)


def _stdin(
    network: Network, plugin: dict[str, Any], attachment: Attachment, prev_result: dict[str, Any] | None
) -> dict[str, Any]:
    """The plugin's object as it stands in the file, with what libcni puts into it."""
    made = {**plugin, "name": network.name, "cniVersion": network.cni_version}
    if prev_result is not None:
        made["prevResult"] = prev_result
    wanted = plugin.get("capabilities") or {}
    runtime = {name: value for name, value in attachment.capability_args.items() if wanted.get(name)}
    if runtime:
        made["runtimeConfig"] = runtime
    return made


def _result(command: str, plugin: str, attachment: Attachment, answer: str, version: str) -> dict[str, Any]:
    try:
        return typed(loads(answer), version)
    except (ValueError, RecursionError) as error:
        words = f"{error}; it printed {process.last_words(answer, 80)!r}"
        raise CniPluginError(command, plugin, attachment.container_id, NO_ERROR_CODE, words) from None


def _plugin_error(done: process.Completed) -> tuple[int, str]:
    found = _object_of(done.stdout)
    code = found.get("code", NO_ERROR_CODE)
    words = "; ".join(
        found[key] for key in ("msg", "details") if isinstance(found.get(key), str) and found[key]
    )
    if words and isinstance(code, int):
        return code, words[: process.WORDS]
    words = process.last_words(done.stderr) or process.last_words(done.stdout) or "it said nothing"
    return NO_ERROR_CODE, f"exit status {done.returncode}: {words}"


def _object_of(text: str) -> dict[str, Any]:
    """A plugin's answer; an empty object for one that is no JSON object."""
    try:
        found = loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _attachment_of(entry: cni_cache.CacheEntry) -> Attachment:
    return Attachment(
        entry.container_id, Path(entry.netns), entry.if_name, entry.cni_args, entry.capability_args
    )


@contextlib.contextmanager
def _collected(errors: list[SandbatchError]) -> Iterator[None]:
    try:
        yield
    except SandbatchError as error:
        errors.append(error)
