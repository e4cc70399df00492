"""The digest of a record: sha256 over its content, so that an edit anywhere in it is noticed."""

import hashlib
import json

NAME = "digest"


def of(content: dict) -> str:
    """sha256 (hex) over canonical JSON, keys sorted, of all fields but the digest itself.

    ValueError for what JSON cannot hold. The order of fields and white space do not count; 1 and 1.0 are two values.
    """
    rest = {name: value for name, value in content.items() if name != NAME}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def seal(content: dict) -> dict:
    """The content with its digest, last; to be done again after any change."""
    rest = {name: value for name, value in content.items() if name != NAME}
    return {**rest, NAME: of(rest)}


def check(content: dict) -> None:
    """ValueError if the content is not what was sealed."""
    if content.get(NAME) != of(content):
        raise ValueError(f"field {NAME} is not that of the content: it was edited after it was written")
