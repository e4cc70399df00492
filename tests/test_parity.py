"""The product of switches: in fp32 our ids are vanilla's, or the difference is a tie and is called one."""

from functools import cache
from itertools import product

import pytest
import torch
from torch._inductor import compile_fx

from fastllama import demo
from fastllama.demo.text import held_out_text
from fastllama.kernels import native
from fastllama.kernels.linear import can_pack
from fastllama.lab.measuring.parity import compare, top_margin
from tests.pairwise import each_value, pairwise
from tests.tiny import GREEDY, SAMPLED, generate, pair, prompt

NEW = 24  # with prompts of 14 tokens, past the 32 positions that a dynamic rope was made for
FACTORS = {
    "batch": ["one", "padded", "three"],
    "kv_heads": [4, 2, 1],
    "cache": ["exact", "large"],
    "tied": [False, True],
    "rope": ["default", "llama3", "linear", "dynamic"],
}
FULL = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]


def name(case: dict) -> str:
    return "-".join(str(value) for value in case.values())


def assert_parity(vanilla, inputs: dict, ours_ids, reference_ids, greedy: bool) -> None:
    """Equal, or for greedy decoding a tie in the reference's own fp32 logits."""
    if torch.equal(ours_ids, reference_ids):
        return
    assert greedy, "sampled ids differ from vanilla's under the same seed"
    width = inputs["input_ids"].shape[1]

    def margin(row: int, position: int) -> float:
        real = inputs["input_ids"][row][inputs["attention_mask"][row] != 0]
        tokens = torch.cat((real, reference_ids[row, width : width + position]))[None]
        with torch.no_grad():
            return top_margin(vanilla(input_ids=tokens).logits[0, -1])

    verdict, divergence = compare(ours_ids[:, width:], reference_ids[:, width:], "fp32", margin)
    assert verdict == "tie", f"ids differ where vanilla was sure: {divergence}"


@cache
def vanillas_ids(kv_heads: int, rope: str, tied: bool, batch: str, greedy: bool) -> torch.Tensor:
    """Asked once for what several cases of ours are compared with."""
    vanilla, _ = pair(kv_heads, rope, tie_word_embeddings=tied)
    return generate(vanilla, prompt(batch), max_new_tokens=NEW, **(GREEDY if greedy else SAMPLED))


HOW = {"native": "native step", "static": "static compile by layer"}


def check(case: dict, compile: str, products: str = "auto", how: str | None = None) -> None:
    vanilla, ours = pair(case["kv_heads"], case["rope"], tie_word_embeddings=case["tied"])
    inputs = prompt(case["batch"])
    width = inputs["input_ids"].shape[1]
    length = width + NEW - 1 if case["cache"] == "exact" else 600
    ours.preallocate(inputs["input_ids"].shape[0], length, compile=compile, products=products)
    for decoding in (GREEDY, SAMPLED):
        greedy = decoding is GREEDY
        expected = vanillas_ids(case["kv_heads"], case["rope"], case["tied"], case["batch"], greedy)
        found = generate(ours, inputs, max_new_tokens=NEW, **decoding)
        assert ours.path.startswith(f"preallocated, {how or HOW.get(compile, f'{compile} compile')}")
        assert products == "auto" or f" {products}" in ours.path.split("products:")[1]
        assert_parity(vanilla, inputs, found, expected, greedy)
        assert len(set(found[0, width:].tolist())) >= 10, "degenerate output proves nothing"


# Named one by one: "auto" takes what a clock found fastest, so that nobody could say what was tested.
PRODUCTS = ["stock", "native", "packed"]


def require(products: str) -> None:
    if products == "native" and native.load() is not None:
        pytest.skip(native.load())
    if products == "packed" and not can_pack(torch.zeros(4, 4)):
        pytest.skip("this torch packs nothing")


def split(case: dict) -> tuple[dict, str]:
    require(case["products"])
    return {factor: value for factor, value in case.items() if factor != "products"}, case["products"]


@pytest.mark.parametrize("case", FULL, ids=name)
def test_eager_product(case):
    check(case, "no", "stock")


@pytest.mark.parametrize("case", pairwise(FACTORS | {"products": PRODUCTS[1:]}), ids=name)
def test_eager_pairwise(case):
    case, products = split(case)
    check(case, "no", products)


@pytest.mark.parametrize("case", [case for case in FULL if case["rope"] != "dynamic"], ids=name)
def test_native_product(case):
    require("native")
    check(case, "native")


@pytest.mark.parametrize("case", each_value(FACTORS | {"products": PRODUCTS}), ids=name)
def test_compiled(case):
    case, products = split(case)
    check(case, "static", products)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    "case",
    [
        {"batch": "padded", "kv_heads": 1, "cache": "exact", "tied": False, "rope": "llama3", "products": "stock"},
        {"batch": "three", "kv_heads": 4, "cache": "exact", "tied": True, "rope": "default", "products": "native"},
    ],
    ids=name,
)
def test_compiled_whole(case):
    case, products = split(case)
    check(case, "static", products, "static compile of the whole step (the test says so)")


@pytest.mark.full
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("case", FULL, ids=name)
def test_compiled_product(case, products):
    require(products)
    check(case, "static", products)


@pytest.mark.full
@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("case", pairwise(FACTORS | {"products": PRODUCTS}), ids=name)
def test_compiled_whole_pairwise(case):
    case, products = split(case)
    check(case, "static", products, "static compile of the whole step")


@pytest.mark.parametrize("rope", ["yarn", "longrope"])
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_other_ropes(rope, batch):
    check({"batch": batch, "kv_heads": 2, "cache": "large", "tied": False, "rope": rope}, "no")


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 32}], ids=str)
def test_other_shapes(changes):
    vanilla, ours = pair(**changes)
    with torch.no_grad():
        for name_, parameter in vanilla.named_parameters():
            if name_.endswith("bias"):
                parameter.normal_()
    ours.load_state_dict(vanilla.state_dict())
    inputs = prompt("padded")
    assert torch.equal(
        generate(ours, inputs, max_new_tokens=NEW, **GREEDY), generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    )


@pytest.mark.parametrize(
    ("compile", "fuse"),
    [("no", "qkv"), ("no", "no"), *(pytest.param("static", how, marks=pytest.mark.full) for how in ("qkv", "no"))],
)
def test_fuse(fuse, compile):
    vanilla, ours = pair()
    inputs = prompt("padded")
    ours.preallocate(3, 64, compile=compile, fuse=fuse)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **GREEDY), expected)
    assert ("fused qkv" in ours.path) == (fuse == "qkv")


@pytest.mark.parametrize("compile", [pytest.param("dynamic", marks=pytest.mark.full), "traced dynamic", "fullgraph"])
def test_other_ways_to_compile(compile, monkeypatch):
    if compile == "traced dynamic":
        # With every size a symbol torch's compiler takes a minute and a half; what it is given shows what was traced.
        monkeypatch.setattr(compile_fx, "compile_fx", lambda traced, inputs, **how: traced.forward)
        compile = "dynamic"
    vanilla, ours = pair()
    inputs = prompt("padded")
    ours.preallocate(3, 64, compile=compile)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **GREEDY), expected)
    assert f"{'static' if compile == 'fullgraph' else 'dynamic'} compile" in ours.path


@pytest.mark.parametrize("bucket", [16, 32])
@pytest.mark.parametrize("length", [17, 31, 32, 33])
def test_bucket_borders(bucket, length):
    vanilla, ours = pair()
    inputs = prompt("padded", length)
    ours.preallocate(3, length + NEW, bucket=bucket)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **GREEDY), expected)


class TestDemo:
    """Real text, real weights."""

    @pytest.fixture(scope="class")
    @staticmethod
    def models():
        import transformers
        from transformers import AutoTokenizer

        import fastllama

        folder = demo.resolve("demo", torch.float32)
        vanilla = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours = fastllama.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return vanilla, ours, AutoTokenizer.from_pretrained(folder)

    @pytest.fixture(scope="class")
    @staticmethod
    def known():
        """Vanilla's ids by batch and decoding: asked once for all ways of ours."""
        return {}

    @pytest.fixture(scope="class", params=["no", "static"])
    @staticmethod
    def prepared(request, models):
        vanilla, ours, tokenizer = models
        ours.preallocate(3, 512, compile=request.param)
        yield vanilla, ours, tokenizer
        ours.free()

    @pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
    @pytest.mark.parametrize("batch", ["one", "padded", "three"])
    def test_ids_are_vanillas(self, prepared, known, batch, decoding):
        vanilla, ours, tokenizer = prepared
        ids = torch.tensor(tokenizer.encode(held_out_text()[2000:4000])[:160])
        rows = {"one": [160], "padded": [160, 90, 131], "three": [120, 120, 120]}[batch]
        texts = [tokenizer.decode(ids[160 - count : 160], skip_special_tokens=True) for count in rows]
        inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
        inputs.pop("token_type_ids", None)
        options = {"max_new_tokens": 128, "min_new_tokens": 128, **decoding}
        what = (batch, decoding is GREEDY)
        if what not in known:
            known[what] = generate(vanilla, inputs, **options)
        found = generate(ours, inputs, **options)
        assert_parity(vanilla, inputs, found, known[what], greedy=decoding is GREEDY)
        width = inputs["input_ids"].shape[1]
        for row in found:
            assert len(set(row[width:].tolist())) >= 20, tokenizer.decode(row[width:])
