"""Rows of `sandbatch doctor` about the keys of this host, where its settings name some."""

import ssl

from tasks.signing import check_host, signer, trust
from worker.doctor import Row
from worker.errors import SandbatchError
from worker.settings import Settings


def key_rows(settings: Settings) -> list[Row]:
    """Can they be read, by root alone, and are they this host's own; none where nothing is signed."""
    rows = []
    if settings.signing_key or settings.trusted_keys:
        rows.append(_keys(settings))
    if settings.broker_ca:
        rows.append(_ca(settings))
    return rows


def _keys(settings: Settings) -> Row:
    name, where = "keys", str(settings.signing_key or settings.trusted_keys)
    try:
        check_host(settings)
        own, known = signer(settings), trust(settings)
    except SandbatchError as error:
        return Row(name, f"{error.what}: {error.why}", "", False, error.todo)
    others = len(known.names()) if known else 0
    return Row(name, f"{where}, trusts {others} keys", own.who if own else "", True, "")


def _ca(settings: Settings) -> Row:
    name, path = "broker CA", settings.broker_ca
    try:
        ssl.create_default_context(cafile=str(path))
    except OSError as error:  # an SSLError is one
        words = "it holds no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        return Row(name, f"{path}: {words}", "", False, "copy ca.crt of sandbatch keys there")
    return Row(name, str(path), "", True, "")
