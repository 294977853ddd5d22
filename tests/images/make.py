"""Images made here by umoci: of busybox, of this machine's Python, and of noise that does not compress."""

import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PATH = "PATH=/usr/local/bin:/bin"
PAGE = "Hello World!\n"
ETC = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n",
    "etc/group": "root:x:0:\napp:x:1000:\nlogs:x:2000:app\n",
}
APPLETS = (
    "sh",
    "cat",
    "echo",
    "sleep",
    "true",
    "id",
    "ls",
    "httpd",
    "env",
    "touch",
    "pwd",
    "tar",
    "rm",
    "kill",
)
# Of the standard library, what no program of a test imports.
LEFT_OUT = {"test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo", "pydoc_data"}
LEFT_OUT |= {"site-packages", "dist-packages", "__pycache__", "unittest", "venv"}
FIND_STDLIB = "import sysconfig; print(sysconfig.get_paths()['stdlib'], sysconfig.get_python_version())"


class Layer:
    """A tar in the making; parents come by themselves, everything is root's unless said."""

    def __init__(self) -> None:
        self._raw = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._raw, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._folders: set[str] = set()

    def folder(self, name: str, mode: int = 0o755, uid: int = 0) -> "Layer":
        if name in self._folders:
            return self
        self._parents(name)
        self._folders.add(name)
        return self._add(name, b"", tarfile.DIRTYPE, mode, uid=uid)

    def file(self, name: str, content: bytes | str = b"", mode: int = 0o644) -> "Layer":
        self._parents(name)
        data = content.encode() if isinstance(content, str) else content
        return self._add(name, data, tarfile.REGTYPE, mode)

    def link(self, name: str, aim: str) -> "Layer":
        self._parents(name)
        return self._add(name, b"", tarfile.SYMTYPE, 0o777, aim)

    def bytes(self) -> "bytes":
        self._tar.close()
        return self._raw.getvalue()

    def _parents(self, name: str) -> None:
        for parent in reversed(Path(name).parents):
            if str(parent) != ".":
                self.folder(str(parent))

    def _add(
        self, name: str, data: "bytes", kind: "bytes", mode: int, aim: str = "", uid: int = 0
    ) -> "Layer":
        info = tarfile.TarInfo(name)
        info.size, info.type, info.mode, info.linkname, info.uid = len(data), kind, mode, aim, uid
        self._tar.addfile(info, io.BytesIO(data))
        return self


@dataclass(frozen=True)
class Layout:
    """An OCI layout with images by tag."""

    folder: Path

    def make(
        self, tag: str, layers: Iterable[Layer], config: Mapping[str, Iterable[str]] | None = None
    ) -> str:
        """One image; `config` has umoci's names: cmd, env, entrypoint, user, exposedports, … The tag."""
        if not (self.folder / "index.json").exists():
            _umoci("init", "--layout", str(self.folder))
        image = f"{self.folder}:{tag}"
        _umoci("new", "--image", image)
        for layer in layers:
            tar = self.folder.with_name(f"{self.folder.name}-{tag}.tar")
            tar.write_bytes(layer.bytes())
            _umoci("raw", "add-layer", "--image", image, str(tar))
            tar.unlink()
        flags = [f"--config.{name}={value}" for name, values in (config or {}).items() for value in values]
        _umoci("config", "--image", image, *(flags or ["--author=tests"]))
        return tag

    def blobs(self, tag: str) -> list[str]:
        """The digests of its layers, lowest first."""
        index = json.loads((self.folder / "index.json").read_text())
        (found,) = [
            one["digest"]
            for one in index["manifests"]
            if one["annotations"]["org.opencontainers.image.ref.name"] == tag
        ]
        manifest = json.loads(self.folder.joinpath("blobs", *found.split(":")).read_text())
        return [one["digest"] for one in manifest["layers"]]


def busybox() -> Layer:
    """A small system: busybox under its usual names, a few users, /tmp."""
    program = shutil.which("busybox")
    assert program is not None
    layer = Layer().file("bin/busybox", Path(program).read_bytes(), 0o755)
    for name in APPLETS:
        layer.link(f"bin/{name}", "busybox")
    for name, text in ETC.items():
        layer.file(name, text)
    return layer.folder("tmp", 0o1777).folder("root", 0o700).folder("home/app", uid=1000)


def noise(size: int) -> Layer:
    return Layer().file("noise", os.urandom(size))


def web() -> tuple[list[Layer], dict[str, list[str]]]:
    """An image as people make them: serves its page by busybox's httpd as a user of its own."""
    layers = [
        busybox().file("site/old.html", "old").file("opaque/old", "old").file("site/page", "first"),
        Layer().file("site/index.html", PAGE).file("site/.wh.old.html").file("site/page", "second"),
        Layer().file("opaque/.wh..wh..opq").file("opaque/new", "new"),
    ]
    config = {
        "entrypoint": ["/bin/httpd", "-f", "-v"],
        "cmd": ["-p", "8000"],
        "env": [PATH, "GREETING=hello from the image"],
        "workingdir": ["/site"],
        "user": ["app:logs"],
        "exposedports": ["8000/tcp"],
        "label": ["org.example.team=web"],
        "stopsignal": ["SIGINT"],
    }
    return layers, config


def python() -> tuple[list[Layer], dict[str, list[str]]]:
    """As the official image of Python: /usr/local/bin/python; and the page of gVisor's tutorial."""
    config = {"cmd": ["python3"], "env": [PATH, "LANG=C.UTF-8"], "workingdir": ["/var/www/html"]}
    return [busybox(), _python_layer(), Layer().file("var/www/html/index.html", PAGE)], config


def _python_layer() -> Layer:
    own = next((one for one in ("/usr/bin/python3", sys.executable) if Path(one).exists()), sys.executable)
    program = Path(own).resolve()
    stdlib, version = _output(own, "-c", FIND_STDLIB).split()
    layer = Layer().file(f"usr/local/bin/python{version}", program.read_bytes(), 0o755)
    for name in ("python", "python3"):
        layer.link(f"usr/local/bin/{name}", f"python{version}")
    needed = _libraries(program)
    for folder, folders, files in os.walk(stdlib):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        inside = Path(f"usr/local/lib/python{version}", Path(folder).relative_to(stdlib))
        for name in files:
            path = Path(folder, name)
            if name.endswith((".py", ".so")) and path.exists():
                layer.file(str(inside / name), path.read_bytes())
                needed |= _libraries(path) if name.endswith(".so") else set()
    for library in sorted(needed):
        layer.file(library.lstrip("/"), Path(library).read_bytes(), 0o755)
    return layer


def _libraries(program: Path) -> set[str]:
    return {word for word in _output("ldd", str(program)).split() if word.startswith("/") and ".so" in word}


@functools.cache
def _output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def _umoci(*args: str) -> None:
    done = subprocess.run(["umoci", *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
