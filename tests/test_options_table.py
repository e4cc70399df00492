"""The option sweep's table: the seed's values, products, and what is refused."""

from itertools import combinations
from math import prod

import pytest

from fastllama.lab.options import flags, prompts, table

# Seed 000: "values to test" of each option, and its defaults.
SEED = {
    "ctk_ctv": None,  # the seed names no values
    "grp_att": [{"grp_attn_n": 2}, {"grp_attn_w": 256}, {"grp_attn_n": 2, "grp_attn_w": 256}],
    "keep": [{"keep": 0}, {"keep": 20}, {"keep": -1}],
    "min_p": [{"min_p": 0.0}, {"min_p": 0.3}],
    "mirostat": [
        {"mirostat": version, "mirostat_eta": eta, "mirostat_tau": tau}
        for version, eta, tau in ((1, 0.2, 5.0), (1, 0.02, 8.0), (2, 0.5, 2.0), (2, 0.02, 8.0))
    ],
    "nkvo": [{"no_kv_offload": True}],
    "repeat_last_n": [{"repeat_last_n": n} for n in (0, 32, 128, -1)],
    "repeat_penalty": [{"repeat_penalty": value} for value in (1.0, 1.5)],
    "split": [
        {"parallel": np, "sequences": ns, "p_split": ps}
        for np, ns, ps in ((0.1, 2, 1.0), (0.9, 10, 1.0), (0.1, 2, 0.2), (0.9, 10, 0.2))
    ],
    "temp": [{"temperature": value} for value in (0.0, 0.5, 5.0)],
    "tfs": [{"tfs_z": 0.95}],
    "threads": [{"threads": 1}, {"threads": 2}],
    "top_k": [{"top_k": 5}, {"top_k": 100}],
    "top_p": [{"top_p": 0.5}, {"top_p": 0.99}],
    "typical": [{"typical_p": 0.0}, {"typical_p": 0.9}],
}
SEED_DEFAULTS = {
    "cache_k": "f16",
    "cache_v": "f16",
    "grp_attn_n": 1,
    "grp_attn_w": 512,
    "keep": 0,
    "min_p": 0.1,
    "mirostat": 0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5.0,
    "repeat_last_n": 64,
    "repeat_penalty": 1.0,
    "parallel": 1,
    "sequences": 1,
    "p_split": 0.1,
    "temperature": 0.8,
    "tfs_z": 1.0,
    "threads": 4,
    "top_k": 40,
    "top_p": 0.9,
    "typical_p": 1.0,
}


def test_the_shipped_table_has_every_option_and_value_of_the_seed():
    shipped = table.read()
    assert {name: shipped.defaults[name] for name in SEED_DEFAULTS} == SEED_DEFAULTS
    for option, values in SEED.items():
        given = [setting.given for setting in shipped.options[option]]
        assert values is None or given == values, option
    types = {setting.given.get("cache_k") for setting in shipped.options["ctk_ctv"]} - {None}
    assert types == {"f32", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"}  # f16 is the default
    assert [setting.given for setting in shipped.options["only"]] == [{}]


def test_five_prompts_ship():
    found = prompts.read()
    assert len(found) == 5 and len({prompt.sha256 for prompt in found}) == 5
    assert all(prompt.text == prompt.text.rstrip() for prompt in found)


@pytest.mark.parametrize("combine", [1, 2, 3, 4])
def test_products_are_of_all_settings_of_so_many_options(combine):
    chosen = table.read().chosen(["only", "temp", "top_k", "mirostat", "keep"])
    made = chosen.settings(combine)
    sizes = [3, 2, 4, 3]
    assert len(made) == 1 + sum(prod(together) for together in combinations(sizes, combine))
    assert made[0].is_default and len({setting.name for setting in made}) == len(made)
    if combine == 2:
        both = next(setting for setting in made if setting.name == "temp_5+top_k_5")
        assert both.option == "temp+top_k" and both.words == "--temp 5 --top-k 5"
        assert both.given == {"temperature": 5.0, "top_k": 5}


def test_settings_that_ask_both_of_one_flag_are_a_conflict():
    chosen = table.read().chosen(["keep", "context"])
    made = {setting.name: setting for setting in chosen.settings(2)}
    assert "both 20 and -1 are asked of --keep" in made["keep_20+context_64_keep_all"].conflict
    assert made["keep_20+context_64_keep_20"].conflict is None


def test_ones_own_table_may_be_a_file_or_a_folder_as_the_seed_has_them(tmp_path):
    (tmp_path / "option_temp.txt").write_text("--temp 0/cold\n# words\n--temp 2 --top-k 3/hot\n")
    (tmp_path / "option_keep.txt").write_text("--keep 3/three")
    folder = table.read(tmp_path)
    assert [(name, [s.name for s in each]) for name, each in folder.options.items()] == [
        ("keep", ["three"]),
        ("temp", ["cold", "hot"]),
    ]
    assert folder.options["temp"][1].given == {"temperature": 2.0, "top_k": 3}
    assert folder.defaults == flags.DEFAULTS
    one = table.read(tmp_path / "option_temp.txt")
    assert list(one.options) == ["temp"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--temp 0", "has no name: a line is flags/name"),
        ("--temp/cold", "--temp lacks its value"),
        ("--temp warm/cold", "--temp 'warm' is not allowed; allowed: a number"),
        ("--heat 3/hot", "unknown flag '--heat'"),
        ("--temp 1 --temp 2/hot", "--temp is given twice"),
        ("--min-p 2/all", "min_p=2.0 is not allowed"),
        ("-ctk q3/three", "cache_k='q3' is not allowed"),
        ("-gan 3/three", "grp_attn_w=512 is not a multiple of grp_attn_n=3"),
        ("-ps 2/two", "-ps '2' is not allowed"),
        ("-t 0/none", "-t '0' is not allowed"),
        ("--temp 1/a b", "'a b' is no name"),
        ("--temp 1/..%2f", "is no name"),
        ("--temp 'nan/x", "cannot be read"),
        ("--temp 1/a\n--temp 2/a", "two settings named 'a'"),
        ("[only]\n--temp 1/a", "is the default itself and sets nothing"),
        ("", "has no line"),
    ],
    ids=str,
)
def test_a_bad_line_is_one_sentence(tmp_path, line, sentence):
    path = tmp_path / "option_x.txt"
    path.write_text(line)
    with pytest.raises(ValueError) as fault:
        table.read(path)
    assert sentence in str(fault.value) and "option_x.txt" in str(fault.value) and "\n" not in str(fault.value)


def test_negative_numbers_are_values_and_counts_are_kept_as_written():
    assert flags.parse("--keep -1 --repeat-last-n -1 -np 0.9 -ns 10") == {
        "keep": -1,
        "repeat_last_n": -1,
        "parallel": 0.9,
        "sequences": 10,
    }
    assert [flags.whole(count) for count in (0.1, 0.9, 0, 1, 4)] == [1, 1, 1, 1, 4]
