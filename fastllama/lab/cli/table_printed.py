"""Options of what is printed."""

from fastllama.lab.cli.option import Option

GROUPS = {
    "what is printed": (
        Option(
            "stream",
            "run",
            "stream",
            None,
            (),
            (),
            "print the text when it is whole, not as it is made",
            off=("--no-stream",),
        ),
        Option("json", "run", "json", None, (), (), "print one JSON object at the end instead", own=("--json",)),
        Option(
            "display_prompt",
            "run",
            "display_prompt",
            None,
            ("--display-prompt",),
            (),
            "print the prompt before the text (llama.cpp always does, unless told otherwise)",
            off=("--no-display-prompt",),
        ),
        Option(
            "quiet",
            "run",
            "quiet",
            None,
            ("--log-disable", "--no-perf"),
            (),
            "nothing on standard error but errors",
            own=("-q", "--quiet"),
        ),
        Option("debug", "run", "debug", None, (), (), "show the traceback of an error", own=("--debug",)),
    ),
}
