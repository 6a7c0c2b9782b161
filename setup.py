"""Packaging of LobRA-on-DeepSpeed: everything is installed as `lobra.<package>`; two commands."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="lobra",
    version="0.1.0",
    description="Multi-tenant LoRA fine-tuning on heterogeneous parallel layouts, on DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The maintainers of LobRA-on-DeepSpeed",
    license="Apache-2.0",
    project_urls={"LobRA's paper": "https://arxiv.org/abs/2509.01193"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["lobra", "lobra.*"]),  # follows the links in lobra/
    # Task sets too: a name is looked up there where the working folder has none of it.
    package_data={"": ["*.yaml", "*.css", "*.js"], "lobra": ["py.typed", "trainer_config/*.json"]},
    # Enough to plan, simulate and report; versions that were tested are in constraints.txt.
    install_requires=[
        "numpy>=2.0,<3",
        "scipy>=1.13,<2",
        "pyyaml>=6.0,<7",
        "pydantic>=2.11,<3",
        "pyscipopt>=6.0,<7",
        "ortools>=9.12,<10",
        "cyclopts>=5.5,<6",
        "rich>=13.7,<16",
        "matplotlib>=3.8,<4",
    ],
    extras_require={
        "train": [  # to tokenise, measure and train
            # From 2.8 on gloo has reduce_scatter_tensor; the upper bound keeps the newest build
            # from being fetched by surprise.
            "torch>=2.8,<=2.13.0",
            "deepspeed>=0.19,<0.20",
            "transformers>=5.17,<5.24",
            "peft>=0.19,<0.22",
            "datasets>=4.0,<6",
            "safetensors>=0.5,<1",
            "tensorboard>=2.16,<3",
        ],
        "quantised": ["bitsandbytes>=0.50,<0.51"],  # bases in nf4, moments in eight bits
        "wandb": ["wandb>=0.20,<1"],
        "mlflow": ["mlflow-skinny>=3.0,<4"],
        "serve": [
            "fastapi>=0.115,<1",
            "uvicorn>=0.30,<1",
            "sqlalchemy>=2.0,<3",
            "protobuf>=5.26,<8",
        ],
        "dev": [
            "bitsandbytes>=0.50,<0.51",
            "trl>=1.16,<1.17",  # whose losses ours are compared with, by names that may change
            "pytest>=8.0,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "jsonschema>=4.23,<5",
            "kubernetes-validate>=1.31,<2",  # schemas of Kubernetes, for examples/
            "ruff>=0.15,<1",
            "mypy>=1.15,<3",
            "types-PyYAML>=6.0",
            "pandas>=2.2,<4",
        ],
    },
    entry_points={
        "console_scripts": [
            "lobra=lobra.cli:main",
            "deploy_strategy_plan=lobra.commands.plan:main",
        ],
    },
)
