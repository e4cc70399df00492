"""Setting: a line of the option table, or several of different options together."""

from dataclasses import dataclass, field

from fastllama.lab.options import flags

DEFAULT = "only"  # the option that sets nothing: what every other text is compared with


@dataclass(frozen=True)
class Setting:
    """`given` by name, as the line says it. `conflict`: why these lines cannot be combined, or None."""

    option: str
    name: str
    words: str
    given: dict = field(default_factory=dict)
    conflict: str | None = None

    @property
    def is_default(self) -> bool:
        return self.option == DEFAULT

    def values(self, defaults: dict) -> dict:
        """Every value, those of the line before `defaults`."""
        return {**defaults, **self.given}


def joined(settings: tuple[Setting, ...]) -> Setting:
    """Lines of different options as one."""
    if len(settings) == 1:
        return settings[0]
    given: dict = {}
    conflict = None
    for setting in settings:
        for name, value in setting.given.items():
            if given.setdefault(name, value) != value:
                conflict = f"both {given[name]} and {value} are asked of {flags.SPELLING[name]}"
    try:
        flags.check({**flags.DEFAULTS, **given})
    except ValueError as fault:
        conflict = conflict or str(fault)
    names = (" ".join(filter(None, (setting.words for setting in settings))),)
    return Setting(
        "+".join(setting.option for setting in settings),
        "+".join(setting.name for setting in settings),
        *names,
        given,
        conflict,
    )
