"""What can go wrong, one class for each thing that a caller does differently."""

TRY_AGAIN_LATER = 11  # CNI spec, "Error": the only code that is worth a retry


class SandbatchError(Exception):
    """Something went wrong: `what` it concerns, `why`, and what `todo` about it.

    The three are kept in `args`, because Celery rebuilds an exception from its args.
    """

    can_pass = False  # True where the same act may succeed a little later
    exit_code = 1

    def __init__(self, what: str, why: str, todo: str = "") -> None:
        super().__init__(what, why, todo)
        self.what, self.why, self.todo = what, why, todo

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" + (f"; {self.todo}" if self.todo else "")

    def __repr__(self) -> str:
        """What Celery sends of a failed task, and Flower shows: words, not args."""
        return str(self)


class BadInput(SandbatchError):
    """The user asked for something that cannot be: nothing was done."""

    exit_code = 2


class BadNetwork(BadInput):
    """A network cannot be found, or a CNI configuration file cannot be read."""


class HostNotReady(SandbatchError):
    """This host lacks something that every sandbox needs."""


class Busy(SandbatchError):
    """Another process works on the same sandbox right now."""

    can_pass = True


class ProcessTimeout(SandbatchError):
    """A program did not end within its deadline and was killed."""


class CniPluginError(SandbatchError):
    """A CNI plugin ended with an error; `code` and `msg` are its own words."""

    def __init__(self, command: str, plugin: str, container_id: str, code: int, msg: str) -> None:
        Exception.__init__(self, command, plugin, container_id, code, msg)
        self.command, self.plugin, self.container_id = command, plugin, container_id
        self.code, self.msg = code, msg
        self.can_pass = code == TRY_AGAIN_LATER
        who = f" for {container_id}" if container_id else ""
        self.what, self.why = f"CNI {command} by plugin {plugin}{who}", f"{msg} (code {code})"
        self.todo = (
            "try again later" if self.can_pass else "see the plugin's words above and the host's CNI files"
        )


class RunscError(SandbatchError):
    """runsc or conmon refused a verb; `why` is its own last message, cut short."""


class NotContained(SandbatchError):
    """A created container has something of the host that it was not given, or could write to it."""


class NotReady(SandbatchError):
    """The sandbox did not answer its probe before the deadline, or ended first."""


class ImageError(SandbatchError):
    """An image cannot be had, or cannot be used; `can_pass` where another try may help."""

    def __init__(self, what: str, why: str, todo: str = "", can_pass: bool = False) -> None:
        super().__init__(what, why, todo)
        self.can_pass = can_pass
        self.args = (what, why, todo, can_pass)  # all: Celery rebuilds it from args


class JournalError(SandbatchError):
    """A journal cannot be read. `kind`: torn, empty, foreign, release-KIND; "" where there is none."""

    def __init__(self, what: str, why: str, todo: str = "", kind: str = "") -> None:
        super().__init__(what, why, todo)
        self.kind = kind
        self.args = (what, why, todo, kind)  # all: Celery rebuilds it from args


class BrokerError(SandbatchError):
    """The broker cannot be reached."""

    can_pass = True


class Lost(SandbatchError):
    """A conversation cannot go on: the broker, or the other side, is away or has lost a part of it."""


class HostAway(Lost):
    """A host does not answer, or its worker stops. Nothing is known of what it did last."""


class Refused(SandbatchError):
    """A host's own error, as its client has it."""
