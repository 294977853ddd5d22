"""What a host answers when a client asks for its images, or for less of them."""

from typing import Any

from worker.calls import ImageCall, ImagePruneCall, ImageRemoveCall
from worker.errors import ImageError
from worker.image_store import Image, ImageStore
from worker.journal import stamp


def answer(store: ImageStore, call: ImageCall) -> dict[str, Any]:
    """Do what a call asks for; `images` are those that are here, or were until now.

    Raises:
        BadInput: The image is not here, or in use; the words name its users.
        ImageError: Nobody knows what is in use.
    """
    if isinstance(call, ImageRemoveCall):
        return {"images": [_shape(store.remove(call.digest), [])]}
    if isinstance(call, ImagePruneCall):
        return {"images": [_shape(one, []) for one in store.prune(call.older_than_s)]}
    try:
        users, why = store.users(), ""
    except ImageError as error:
        users, why = None, str(error)
    images = [_shape(one, None if users is None else users.get(one.digest, [])) for one in store.all()]
    return {"images": images, "why": why}


def _shape(image: Image, users: list[str] | None) -> dict[str, Any]:
    """`users` is None where nobody knows them."""
    return {
        "references": list(image.references),
        "digest": image.digest,
        "size_bytes": image.size_bytes,
        "files": image.files,
        "uses": None if users is None else len(users),
        "users": None if users is None else sorted(users),
        "pulled_at": stamp(image.pulled_at),
        "used_at": stamp(image.used_at),
    }
