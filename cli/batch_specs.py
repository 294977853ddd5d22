"""A batch file as what is submitted: specs, a plan; or all that is wrong with it, line by line."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cli import parse, words
from cli.batch_file import read_document
from cli.batch_text import Document, Item, Problem
from tasks.batch import NAME, BatchPlan
from worker.errors import BadInput
from worker.spec import Spec

MOST_SANDBOXES = 1_000_000
OWN = {  # of a spec; for hosts it makes no difference
    *("args", "env", "labels", "ready", "ready_timeout_s", "pids", "reschedule"),
    *("ttl_s", "deadline_at", "stop_grace_s", "restart", "keep_s", "remove"),
}


class BadFile(Exception):
    """Things are wrong in a batch file: `lines` say what, one each, and `summary` how many."""

    def __init__(self, lines: Sequence[str], summary: BadInput) -> None:
        super().__init__(str(summary))
        self.lines, self.summary = lines, summary


@dataclass
class Batch:
    """What a batch file asks for. `origins`: a spec, by identity, with the items that it stands for."""

    file: str
    name: str | None = None
    plan: BatchPlan = field(default_factory=BatchPlan)
    specs: list[Spec] = field(default_factory=list)
    origins: dict[int, tuple[Spec, list[Item]]] = field(default_factory=dict)
    defaults: Item = field(default_factory=Item)


def read(data: bytes, file: str, network: str, options: Mapping[str, str]) -> Batch:
    """Read a batch file.

    Args:
        network: Of specs that name none.
        options: Words of the plan that the command line has, in place of the file's.
    Raises:
        BadFile: All that is wrong with it.
        BadInput: It cannot be read at all, or an option is wrong.
    """
    document = read_document(data, file)
    batch = Batch(file, defaults=document.defaults)
    deadline_at = _read_plan(batch, document, options)
    _read_specs(batch, document, network, deadline_at)
    if not document.specs and not document.problems:
        document.problem(1, "specs", "there are none", "write at least one")
    if not document.problems:
        try:
            batch.plan.needed(len(batch.specs))
        except BadInput as error:
            if "success" in options:
                raise
            document.problem(document.plan.line_of("success"), error.what, error.why, error.todo)
    if document.problems:
        raise _bad_file(file, document.problems)
    return batch


def _bad_file(file: str, problems: Iterable[Problem]) -> BadFile:
    found = sorted(dict.fromkeys(problems), key=lambda one: one.line)
    lines = [one.words(file) for one in found]
    why = f"{len(found)} {'thing is' if len(found) == 1 else 'things are'} wrong, nothing is enqueued"
    return BadFile(lines, BadInput(f"batch {file}", why, "correct the file and try again"))


# -- the plan ------------------------------------------------------------------------------------


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise BadInput(f"name {value!r}", "letters, digits, '_', '.', '-', at most 63", "choose another")
    return value


def _number(value: str, word: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise BadInput(f"{word} {value}", "a number is needed", "for example 10")
    return int(value)


def _waves(value: Any) -> tuple[int, ...]:
    return tuple(
        _number(str(one).strip(), "waves") for one in (value if isinstance(value, list) else value.split(","))
    )


def _yes(value: str) -> bool:
    if value.lower() not in ("true", "false", "yes", "no"):
        raise BadInput(f"fail_fast {value}", "true or false is needed", "leave it out for false")
    return value.lower() in ("true", "yes")


def _deadline(value: str) -> str:
    at = parse.moment(value, "deadline")
    parse.instant(at)
    return at


PLAN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "name": lambda value: {"name": _name(value)},
    "success": lambda value: {"success": value},
    "max_in_flight": lambda value: {"max_in_flight": _number(value, "max_in_flight")},
    "waves": lambda value: {"waves": _waves(value)},
    "deadline": lambda value: {"deadline_at": _deadline(value)},
    "fail_fast": lambda value: {"fail_fast": _yes(value)},
}


def _read_plan(batch: Batch, document: Document, options: Mapping[str, str]) -> str | None:
    """Read the plan into the batch; returns the deadline."""
    given: dict[str, Any] = {"success": "all"}
    asked = {word.replace("-", "_"): (word, value) for word, value in document.plan.words.items()}
    for word, (written, value) in asked.items():
        if word not in PLAN:
            todo = words.suggest(word, (*PLAN, "defaults", "specs"))
            document.problem(document.plan.line_of(written), written, "no such word", todo)
        elif word not in options and value is not None:
            try:
                given |= _planned(word, value)
            except BadInput as error:
                document.problem(document.plan.line_of(written), error.what, error.why, error.todo)
    for word, value in options.items():
        try:
            given |= _planned(word, value)
        except BadInput as error:
            raise BadInput(f"--{error.what.replace('_', '-')}", error.why, error.todo) from None
    batch.name = given.pop("name", None)
    batch.plan = BatchPlan(**given)
    return batch.plan.deadline_at


def _planned(word: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, str) and word != "waves":
        raise BadInput(word, "a text or a number is needed", "correct it")
    made = PLAN[word](value)
    if word != "name":
        BatchPlan(**made)  # which says what is wrong with it
    return made


# -- the specs -----------------------------------------------------------------------------------


def _read_specs(batch: Batch, document: Document, network: str, deadline_at: str | None) -> None:
    """Read the specs into the batch. Those that are written alike are read once, and are one object."""
    usual, troubles = words.read(
        {key: value for key, value in document.defaults.words.items() if key != "count"}
    )
    document.problems += [_problem(one, document.defaults, document.defaults) for one in troubles]
    usual_count = _count(document, document.defaults, 1)
    known: dict[str, Spec | list[words.Trouble]] = {}
    for item in document.specs:
        count = _count(document, item, usual_count)
        own = {key: value for key, value in item.words.items() if key != "count"}
        key = words.key(own)
        if key not in known:
            slots, troubles = words.read(own)
            found = words.make(slots, usual, network, deadline_at)
            known[key] = [*troubles, *(found if isinstance(found, list) else ())] or found
        spec = known[key]
        if isinstance(spec, list):
            document.problems += [_problem(one, item, document.defaults) for one in spec]
        elif len(batch.specs) + count > MOST_SANDBOXES:
            why = f"the file asks for more than {MOST_SANDBOXES} sandboxes"
            document.problem(item.line_of("count"), "count", why, "make it several batches")
            return
        else:
            batch.specs += [spec] * count
            batch.origins.setdefault(id(spec), (spec, []))[1].append(item)


def _count(document: Document, item: Item, usual: int) -> int:
    value = item.words.get("count")
    if value is None:
        return usual
    try:
        count = _number(value if isinstance(value, str) else "", "count")
        if count < 1:
            raise BadInput("count 0", "at least 1 is needed", "leave the spec out")
    except BadInput as error:
        document.problem(item.line_of("count"), error.what, error.why, error.todo)
        return 1
    return count


def _problem(trouble: words.Trouble, item: Item, defaults: Item) -> Problem:
    place = defaults if trouble.word not in item.words and trouble.word in defaults.words else item
    return Problem(place.line_of(trouble.word), trouble.what, trouble.why, trouble.todo)


# -- what hosts can do ---------------------------------------------------------------------------


def check_needs(batch: Batch, validate: Callable[[Spec], None]) -> None:
    """Refuse what no host can do; each distinct need is looked at once.

    Raises:
        BadFile: Names the lines.
    """
    needs: dict[str, tuple[Spec, list[Item]]] = {}
    for spec, items in batch.origins.values():
        needs.setdefault(_need(spec), (spec, []))[1].extend(items)
    problems = []
    for spec, items in needs.values():
        try:
            validate(spec)
        except BadInput as error:
            what = error.what.removeprefix("--")
            word = _word_of(what)
            first, *others = dict.fromkeys(_line(word, item, batch.defaults) for item in items)
            problems.append(Problem(first, what, error.why, error.todo, tuple(others)))
    if problems:
        raise _bad_file(batch.file, problems)


def _need(spec: Spec) -> str:
    """What `validate` looks at: whether there are ports and addresses, not which."""
    networks = [(one.name, bool(one.ips), bool(one.mac), bool(one.aliases)) for one in spec.networks]
    rest = spec.model_dump(exclude={*OWN, "networks", "publish", "hosts"})
    return repr((networks, bool(spec.publish), bool(spec.hosts), rest))


# The first word of an error of `validate` -> words of a spec that it speaks of.
SPOKEN_OF = {
    "bind": ("volume", "mount", "mounts"),
    "network": ("network", "networks"),
    "memory": ("memory", "memory_bytes"),
    "label": ("on",),
    "writable": ("writable",),
}


def _word_of(what: str) -> tuple[str, ...]:
    first = what.replace("-", "_").split(" ")[0].rstrip(":")
    return SPOKEN_OF.get(first, (first,))


def _line(spoken_of: tuple[str, ...], item: Item, defaults: Item) -> int:
    for place in (item, defaults):
        for word in spoken_of:
            if word in place.words:
                return place.line_of(word)
    return item.line
