"""Install both packages: hola_megatron (the stack) and hola_kernels (kernels/hola_kernels)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# tasks of evaluation; "dev" has them too, since tests compare with the harness
EVAL = ["lm-eval[hf]>=0.4.13,<0.5", "wonderwords>=3,<4"]
EXTRAS = {
    # needs a CUDA build of torch and `--no-build-isolation`; 2.13 to 2.16 do not load beside cuBLAS 13.1
    "te": ["transformer-engine[pytorch,core_cu13]>=2.17"],
    "muon": ["emerging-optimizers>=0.3,<0.4"],
    "deepspeed": ["deepspeed>=0.19,<0.20"],
    "eval": EVAL,
    "wandb": ["wandb"],
    "dev": ["pytest>=8", "pytest-timeout", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9",
            "emerging-optimizers>=0.3,<0.4", "deepspeed>=0.19,<0.20", *EVAL],
}

setup(
    name="hola-megatron",
    version="0.1.0",
    description="Distributed pretraining of linear-attention language models with an exact memory",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["hola_megatron", "hola_megatron.*"])
    + find_packages("kernels", include=["hola_kernels", "hola_kernels.*"]),
    package_dir={"hola_kernels": "kernels/hola_kernels"},
    package_data={"hola_megatron.data": ["bundled/*"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",  # megatron-core 0.19 imports it without declaring it
        "megatron-core>=0.19,<0.20",
        "mosaicml-streaming>=0.13,<0.14",
        "transformers>=4.57,<6",  # tested with 4.57.6 and 5.24.0
        "safetensors>=0.5",
        "pydantic>=2.8",
        "pyyaml>=6",
        "tensorboard",
        "matplotlib",
        "psutil",
        "sentencepiece",
        "pyarrow",
        "zstandard",
        "filelock>=4.2",  # leases, and locks that are not truncated
        "tqdm",
        "fsspec",
    ],
    extras_require=EXTRAS,
)
