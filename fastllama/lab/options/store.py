"""Store: the folders of a sweep. Of each run a text, a log, and last its record, by which a run is known to be done.

outputs/MODEL_OPTION/outputs_res/PROMPT_SETTING_runN.txt
outputs/MODEL_OPTION/outputs_log/PROMPT_SETTING_runN.log and .json
aggregation/MODEL_OPTION.csv
"""

import csv
import io
import json
from pathlib import Path

from fastllama.lab.options.prompts import PromptText
from fastllama.lab.options.setting import Setting
from fastllama.lab.records import words

FORMAT = 1


class Store:
    """Below `out`, of one model."""

    def __init__(self, out: str | Path, model: str):
        self.out, self.model = Path(out), model

    def require_folder(self) -> None:
        """Raises `OSError` where nothing can be written below `out`."""
        blocked = next((path for path in (self.out, *self.out.parents) if path.exists()), None)
        if blocked is not None and not blocked.is_dir():
            raise NotADirectoryError(f"--out {self.out}: {blocked} is no folder")

    def folder(self, setting: Setting) -> Path:
        return self.out / "outputs" / f"{self.model}_{setting.option}"

    def stem(self, setting: Setting, prompt: PromptText, run: int) -> str:
        return f"{prompt.name}_{setting.name}_run{run}"

    def record_path(self, setting: Setting, prompt: PromptText, run: int) -> Path:
        return self.folder(setting) / "outputs_log" / f"{self.stem(setting, prompt, run)}.json"

    def read(self, setting: Setting, prompt: PromptText, run: int, asked: dict) -> dict | None:
        """A run that is done; None where it is not. Raises `ValueError` where something else was asked there."""
        path = self.record_path(setting, prompt, run)
        if not path.exists():
            return None
        kept = words.load_json(path)
        if not isinstance(kept, dict) or kept.get("format") != FORMAT or not isinstance(kept.get("asked"), dict):
            raise ValueError(f"{path} is no record of a run: remove it, or give another --out")
        found, asked = kept["asked"], json.loads(json.dumps(asked))
        name = next((name for name in {**asked, **found} if asked.get(name) != found.get(name)), None)
        if name is not None:
            raise ValueError(
                f"{path} was made with other {name} ({found.get(name)!r}, now {asked.get(name)!r}): remove it, or give "
                "another --out"
            )
        return kept

    def write(self, setting: Setting, prompt: PromptText, run: int, record: dict, text: str, log: list[str]) -> None:
        """Everything of a run; its record last."""
        stem = self.stem(setting, prompt, run)
        for folder, ending, content in (("outputs_res", "txt", text), ("outputs_log", "log", "\n".join(log) + "\n")):
            path = self.folder(setting) / folder / f"{stem}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            words.write_atomically(path, content)
        words.dump_json(self.record_path(setting, prompt, run), {"format": FORMAT, **record})

    def write_csv(self, name: str, rows: list[dict]) -> Path:
        """A table with the columns of all rows, empty where a row lacks one."""
        path = self.out / "aggregation" / f"{self.model}_{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        words.write_atomically(path, text.getvalue())
        return path
