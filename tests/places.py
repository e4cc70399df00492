"""Places in a nested JSON value: the keys and indices that lead to it."""


def places(value, path=()):
    """Every place below `value`, outer ones first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, content in inner:
        yield (*path, key)
        yield from places(content, (*path, key))


def at(value, path):
    """What lies at a place."""
    for key in path:
        value = value[key]
    return value


def put(value, path, content) -> None:
    """Replace what lies at a place."""
    at(value, path[:-1])[path[-1]] = content
