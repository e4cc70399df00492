"""Options of the text that goes in."""

from fastllama.lab.cli.option import FILE, TEXT, Option

GROUPS = {
    "the text": (
        Option("prompt", "run", "prompt", TEXT, ("-p", "--prompt"), (), "the text to go on from"),
        Option(
            "file",
            "run",
            "file",
            FILE,
            ("-f", "--file"),
            (),
            "a file that holds it; without either: standard input. A last line end is left out",
        ),
        Option(
            "escape",
            "run",
            "escape",
            None,
            ("-e", "--escape"),
            (),
            r"\n, \t, \\, \' and \" in the prompt are escapes (newer llama.cpp reads them unless told not to)",
            off=("--no-escape",),
        ),
        Option(
            "interactive",
            "run",
            "interactive",
            None,
            ("-i", "--interactive", "-cnv", "--conversation"),
            (),
            "a turn for each line of standard input, with the cache kept between turns; /quit or end of file ends it, "
            "Ctrl-C ends an answer; -p or -f is the first turn",
        ),
        Option(
            "system_prompt",
            "run",
            "system_prompt",
            TEXT,
            ("-sys", "--system-prompt"),
            (),
            "with --interactive: what the chat template puts first",
        ),
        Option(
            "chat_template",
            "run",
            "chat_template",
            None,
            (),
            (),
            "with --interactive: lines are the text itself, though the tokenizer has a chat template",
            off=("--no-chat-template", "-no-cnv", "--no-conversation"),
        ),
        Option(
            "from_llama_cpp",
            "run",
            "from_llama_cpp",
            TEXT,
            (),
            (),
            "a command line of llama.cpp's main: say what each of its options is here, and run it; options beside it "
            "count more",
            own=("--from-llama-cpp",),
        ),
        Option(
            "dry_run", "run", "dry_run", None, (), (), "print what would run, or that translation", own=("--dry-run",)
        ),
    ),
}
