import re
from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "pytest>=8",
    "pytest-xdist>=3.8",
    "hypothesis>=6.100",
    "gguf>=0.10",
    "peft>=0.17",
    "matplotlib>=3.8",
    "scipy>=1.13",
    "ruff>=0.9",
]
# What `transformers serve` imports.
SERVE = ["fastapi>=0.115", "openai>=1.98", "pydantic>=2", "uvicorn>=0.30"]
TEST += ["selenium>=4.51", "mypy>=2", *SERVE]

HERE = Path(__file__).parent
# Read and not imported: torch need not be there yet.
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (HERE / "fastllama/__init__.py").read_text(encoding="utf-8"), re.M)

setup(
    name="fastllama",
    version=VERSION,
    description="A drop-in LlamaForCausalLM that generates the same tokens faster, and the laboratory that proves it",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["fastllama", "fastllama.*"]),
    py_modules=["run_llama"],
    package_data={
        "fastllama": ["py.typed"],
        "fastllama.kernels": ["native_code/*"],
        "fastllama.lab": ["sweeps/*.toml"],
        "fastllama.lab.options": ["table.txt", "inputs/*.txt"],
        "fastllama.demo": [
            "heldout/*",
            "weights/*.json",
            "weights/target/*",
            "weights/draft/*",
        ],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "accelerate>=1.10",
        "tensorboard>=2.21",
        "rich>=13",
        "tomli>=2; python_version < '3.11'",
    ],
    entry_points={"console_scripts": ["fastllama=fastllama.lab.cli.command:main"]},
    extras_require={
        "test": TEST,
        "plot": ["matplotlib>=3.8"],
        "compare": ["scipy>=1.13"],
        "peft": ["peft>=0.17"],
        "serve": SERVE,
    },
)
