"""A batch file: which format it is in, and where it cannot be read."""

import json

import yaml

from cli.batch_json import Json, read_lines
from cli.batch_text import Document
from cli.batch_yaml import Yaml
from worker.errors import BadInput


def read_document(data: bytes, name: str) -> Document:
    """Read a batch file; `name` ends in .jsonl, .json, .yaml or .yml, else its text shows what it is.

    Raises:
        BadInput: It is no such text at all. Smaller problems are in the document.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{name} line {line}", "it is no UTF-8", "write the file in UTF-8") from None
    ending = name.rpartition(".")[2].lower()
    may_be_json = ending not in ("yaml", "yml")
    try:
        if ending in ("jsonl", "ndjson") or (may_be_json and _looks_like_lines(text)):
            return read_lines(text)
        is_json = ending == "json" or (may_be_json and _looks_like_json(text))
        return (Json if is_json else Yaml)(text).read()
    except json.JSONDecodeError as error:
        raise BadInput(f"{name} line {error.lineno}", f"no JSON: {error.msg}", "correct it") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", None) or 0) + 1
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        raise BadInput(f"{name} line {line}", f"no YAML: {why}", "correct it") from None
    except RecursionError:
        raise BadInput(name, "its lists are nested too deep", "a batch file needs no such thing") from None


def _looks_like_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_int=str), dict | list)
    except ValueError:
        return False


def _looks_like_lines(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines or not all(line.lstrip().startswith("{") for line in lines):
        return False
    return len(lines) > 1 or (_looks_like_json(text) and "specs" not in json.loads(text, parse_int=str))
